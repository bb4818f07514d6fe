"""Fused kernels give what single operations give, up to rounding: torch's on the CPU, and those in Triton.

Without a GPU the kernels in Triton run in its interpreter, which cuts to bfloat16 where a GPU rounds.
"""

from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB, LARS, NovoGrad
from lightning_lars.optim.backends import choice
from tests.support.layers import give_gradients, groups, layers, values, walk
from tests.support.slow import slow_unless

# Triton's interpreter is numpy, which warns of what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")

OPTIONS = [
    (LARS, {}),
    (LARS, {"weight_decay": 0.1}),
    (LARS, {"weight_decay": 0.1, "dampening": 0.3}),
    (LARS, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (LARS, {"weight_decay": 0.1, "lr_in_momentum": True}),
    (LARS, {"weight_decay": 0.1, "trust_clip": "larc", "trust_coefficient": 0.5}),
    (LARS, {"trust_clip": 0.002, "max_grad_norm": 1.0, "maximize": True}),
    (LARS, {"nesterov": True}),
    (LARS, {"nesterov": True, "weight_decay": 0.1, "dampening": 0.3, "lr_in_momentum": True}),
    (LARS, {"nesterov": True, "weight_decay": 0.5, "trust_coefficient": 0.5, "trust_clip": 10.0}),
    (LARS, {"momentum": 0.0, "weight_decay": 0.1}),
    (LARS, {"momentum": 0.0, "trust_coefficient": 1e-9}),
    (LARS, {"denominator": "decayed_gradient", "weight_decay": 0.1}),
    (LARS, {"denominator": "decayed_gradient", "nesterov": True, "trust_clip": "larc"}),
    (LARS, {"denominator": "momentum", "weight_decay": 0.1, "dampening": 0.3}),
    (LARS, {"denominator": "momentum", "momentum": 0.0, "maximize": True}),
    (LARS, {"denominator": "momentum", "nesterov": True, "weight_decay": 0.1, "dampening": 0.3}),
    (
        LARS,
        {"denominator": "momentum", "nesterov": True, "decoupled_weight_decay": True, "weight_decay": 0.1},
    ),
    (LARS, {"trust_coefficient": 1e-9, "weight_decay": 0.1}),
    (LARS, {"denominator": "momentum", "dampening": 1 - 1e-9}),
    (LAMB, {}),
    (LAMB, {"weight_decay": 0.0}),
    (LAMB, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (LAMB, {"betas": (0.0, 0.9), "eps": 1e-3, "max_grad_norm": 1.0, "maximize": True}),
    (LAMB, {"trust_clip": (0.1, 2.0), "max_weight_norm": 1.0}),
    (NovoGrad, {}),
    (NovoGrad, {"weight_decay": 0.1, "grad_averaging": True}),
    (NovoGrad, {"weight_decay": 0.1, "decoupled_weight_decay": True, "max_grad_norm": 1.0, "maximize": True}),
]
ONLY_IN_TRITON = [
    (LAMB, {"bias_correction": False}),
    (LAMB, {"grad_averaging": False, "max_grad_norm": 1.0}),
    (NovoGrad, {"betas": (0.0, 0.9), "weight_decay": 0.1}),
]
# Every kernel in Triton, and every load and store in it. Its interpreter is slow: what depends on dtypes, on
# sizes or on a tensor lr, but on no other option, is tested with these, with all only among the slow tests.
EVERY_KERNEL = [
    (LARS, {"weight_decay": 0.1, "lr_in_momentum": True}),
    (LARS, {"momentum": 0.0, "weight_decay": 0.1}),
    (LARS, {"denominator": "momentum", "nesterov": True, "weight_decay": 0.1, "dampening": 0.3}),
    (LAMB, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
]
CASES = [("torch", *case) for case in OPTIONS] + [("triton", *case) for case in OPTIONS + ONLY_IN_TRITON]
BOTH = [(kernels, optimizer_class) for kernels in ("torch", "triton") for optimizer_class in (LARS, LAMB)]
both_kernels = pytest.mark.parametrize(("kernels", "optimizer_class"), BOTH)


def named(value):
    # The address of a function is another in every process, and pytest-xdist compares names.
    return getattr(value, "__name__", None) or str(value)


every_kernel = pytest.mark.parametrize(
    ("kernels", "optimizer_class", "options"),
    [slow_unless(case[0] == "torch" or case[1:] in EVERY_KERNEL, *case) for case in CASES],
    ids=named,
)


@pytest.fixture
def real_device(kernels, monkeypatch):
    """Where these kernels run."""
    if kernels == "torch":
        return "cpu"
    pytest.importorskip("triton", minversion="3.3", reason="there is no triton for this system")
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(choice, "TRITON_DEVICES", {"cpu"})
    return "cpu"


@pytest.fixture
def device(real_device, request):
    """Where these kernels run, with few elements to a chunk."""
    request.getfixturevalue("small_chunks")
    return real_device


class Calls:
    """Counts the calls of torch's kernels, or the launches of those in Triton, which are made."""

    def __init__(self, kernels):
        if kernels == "torch":
            self.patches = [
                patch.object(torch, name, wraps=getattr(torch, name))
                for name in ("_fused_sgd_", "_fused_adamw_")
            ]
        else:
            from lightning_lars.optim.backends import triton

            self.patches = [patch.object(triton, "arguments", wraps=triton.arguments)]

    def __enter__(self):
        self.mocks = [each.__enter__() for each in self.patches]
        return self

    def __exit__(self, *args):
        for each in self.patches:
            each.__exit__(*args)

    @property
    def count(self):
        return sum(mock.call_count for mock in self.mocks)


def close(actual, expected, dtype=torch.float32):
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    # What is left of weights up to 4 keeps their rounding.
    atol = 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def large_layers(dtype=torch.float32):
    """Layers of several chunks of the kernels in Triton, whole ones and cut ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"linear.weight": (61, 151), "norm.bias": (8192,)}
    return {name: Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in shapes.items()}


def channels_last_layers(dtype=torch.float32):
    """Layers of which one is dense, but in another order of dimensions."""
    params = layers(dtype)
    weight = params["conv.weight"].detach().to(memory_format=torch.channels_last)
    return {**params, "conv.weight": Parameter(weight)}


def on(device, params):
    return {name: Parameter(p.detach().to(device)) for name, p in params.items()}


def compare(device, optimizer_class, options, dtype=torch.float32, steps=2, tensor_lr=False, layers=layers):
    """Walk with and without kernels side by side, and compare after every step.

    Both start each step from the same weights, so that a difference is that of one step.
    """
    fused, single = on(device, layers(dtype)), on(device, layers(dtype))
    lr = torch.tensor(0.1, device=device) if tensor_lr else 0.1
    left = optimizer_class(groups(fused), lr=lr, **{"fused": True, **options})
    right = optimizer_class(groups(single), lr=lr, **{**options, "fused": False})
    for step in range(steps):
        walk(left, [step])
        walk(right, [step])
        close(values(fused), values(single), dtype)
        close(left.trust_ratios(), right.trust_ratios())
        for p, other in zip(fused.values(), single.values(), strict=True):
            assert left.state[p].keys() == right.state[other].keys()
            for key, state in left.state[p].items():
                assert state.dtype == right.state[other][key].dtype
                close(state, right.state[other][key])
            p.data.copy_(other.data)


# With each option the kernels in Triton have steps of the reference to follow, in test_parity.py.
@every_kernel
def test_fused_steps_equal_unfused_steps(device, kernels, optimizer_class, options):
    with Calls(kernels) as calls:
        compare(device, optimizer_class, options)
    # A smaller ratio than torch's kernel has digits for is left to single operations.
    assert calls.count > 0


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, slow_unless(False, torch.float16)], ids=str)
def test_fused_steps_round_like_unfused_steps(device, kernels, optimizer_class, options, dtype):
    with Calls(kernels) as calls:
        compare(device, optimizer_class, options, dtype)
    assert calls.count > 0


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, slow_unless(False, torch.bfloat16)], ids=str)
def test_the_kernels_split_large_layers_into_chunks(real_device, kernels, optimizer_class, options, dtype):
    with Calls(kernels) as calls:
        compare(real_device, optimizer_class, options, dtype, layers=large_layers)
    assert calls.count > 0


@every_kernel
def test_the_kernels_accept_a_tensor_lr(device, optimizer_class, options):
    compare(device, optimizer_class, options, tensor_lr=True)


@both_kernels
def test_the_kernels_accept_layers_in_another_memory_format(device, kernels, optimizer_class):
    with Calls(kernels) as calls:
        compare(device, optimizer_class, {"weight_decay": 0.1}, layers=channels_last_layers)
    assert calls.count > 0


@both_kernels
def test_the_kernels_accept_layers_without_elements(device, optimizer_class):
    def with_empty(dtype):
        empty = {name: Parameter(torch.zeros(0, 3, dtype=dtype)) for name in ("empty", "norm.bias")}
        return {**layers(dtype), **empty}

    def only_empty(dtype):
        return {"empty": Parameter(torch.zeros(0, 3, dtype=dtype))}

    compare(device, optimizer_class, {"max_grad_norm": 1.0}, layers=with_empty)
    compare(device, optimizer_class, {}, layers=only_empty)


@both_kernels
def test_layers_of_zeros_and_gradients_of_zeros_follow_the_zero_rule(device, optimizer_class):
    def zeros(dtype):
        return {name: Parameter(torch.zeros_like(p)) for name, p in layers(dtype).items()}

    compare(device, optimizer_class, {"weight_decay": 0.1}, layers=zeros)
    params = on(device, layers())
    optimizer = optimizer_class(groups(params), fused=True, **({"eps": 0.0}))
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    if optimizer_class is LARS:  # 0 / 0 is Adam's own direction without eps
        assert all(value.isfinite().all() for value in values(params).values())
        assert all(is_at.item() for is_at in optimizer.at_zero_rule().values())


@both_kernels
def test_the_kernels_accept_unaligned_addresses(device, optimizer_class):
    def cut(dtype):
        return {
            name: Parameter(p.detach().new_empty(p.numel() + 1)[1:].view(p.shape).copy_(p.detach()))
            for name, p in layers(dtype).items()
        }

    fused, single = cut(torch.float32), cut(torch.float32)
    left = optimizer_class(groups(fused), fused=True)
    right = optimizer_class(groups(single), fused=False)
    if device == "cuda":
        pytest.skip("a parameter that moves to the GPU is aligned there")
    for step in range(2):
        walk(left, [step])
        walk(right, [step])
    close(values(fused), values(single))


@both_kernels
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e25])
def test_norms_include_squares_beyond_float32(device, kernels, optimizer_class, scale):
    if optimizer_class is LAMB and scale > 1:
        pytest.skip("the second moment is beyond float32 too")
    options = {"eps": 0.0} if optimizer_class is LARS else {"eps": scale, "weight_decay": 0.0}
    ends = []
    for fused in (True, False):
        params = on(device, layers())
        optimizer = optimizer_class(groups(params), fused=fused, **options)
        for p in params.values():
            if optimizer_class is LAMB:
                p.data.mul_(scale)
            p.grad = scale * torch.ones_like(p)
        optimizer.step()
        assert not any(is_at.item() for is_at in optimizer.at_zero_rule().values())
        ends.append(optimizer.trust_ratios())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=0.0)


@both_kernels
def test_one_unaligned_layer_does_not_change_the_steps_of_the_others(real_device, optimizer_class):
    ends = []
    for fused in (True, False):
        params = on(real_device, large_layers(torch.bfloat16))
        optimizer = optimizer_class(groups(params), fused=fused)
        give_gradients(params.values(), 0)
        grad = params["linear.weight"].grad
        memory = grad.new_empty(grad.numel() + 1)
        params["linear.weight"].grad = memory[1:].view_as(grad).copy_(grad)
        optimizer.step()
        ends.append(values(params))
    close(*ends, torch.bfloat16)


@both_kernels
def test_gradients_are_not_modified(device, optimizer_class):
    params = on(device, layers())
    give_gradients(params.values(), 0)
    before = [p.grad.clone() for p in params.values()]
    optimizer_class(groups(params), weight_decay=0.1, maximize=True, max_grad_norm=0.1, fused=True).step()
    for p, grad in zip(params.values(), before, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_gradients_are_clipped_by_the_norm_of_those_that_are_finite(device, kernels, magnitude, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (0, 4), (), (201,), (64,), (7, 31), (5,)]
    grads = [(torch.randn(shape, generator=generator) * magnitude).to(device, dtype) for shape in shapes]
    grads.append((torch.randn(130, generator=generator) * magnitude).to(device, dtype)[1:])  # unaligned
    grads[-2][1] = torch.inf
    params = [Parameter(torch.zeros_like(grad)) for grad in grads]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    bound = 0.5 * magnitude
    group = {"params": params, "layer_adaptation": False}
    LARS([group], lr=1.0, momentum=0.0, weight_decay=0.0, max_grad_norm=bound, fused=True).step()
    finite = [grad.double() for grad in grads if grad.isfinite().all()]
    norm = sum(float(grad.square().sum()) for grad in finite) ** 0.5
    for p, grad in zip(params, grads, strict=True):
        expected = (-grad.double() * bound / norm).to(dtype)
        torch.testing.assert_close(
            p.detach(), expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=0.0
        )


@both_kernels
@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_continues_fused_or_unfused(device, optimizer_class, first):
    params = on(device, layers())
    optimizer = optimizer_class(groups(params), fused=first, weight_decay=0.1)
    walk(optimizer, range(2))
    saved, weights = deepcopy(optimizer.state_dict()), values(params)
    ends = []
    for fused in (True, False):
        own = {name: Parameter(weight.clone()) for name, weight in weights.items()}
        resumed = optimizer_class(groups(own), fused=fused, weight_decay=0.1)
        resumed.load_state_dict(deepcopy(saved))
        assert all(group["fused"] is fused for group in resumed.param_groups)
        walk(resumed, range(2, 4))
        ends.append(values(own))
    close(*ends)


@both_kernels
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_spoils_no_other_layer(device, optimizer_class, bad):
    ends = []
    for fused in (True, False):
        params = on(device, layers())
        optimizer = optimizer_class(groups(params), fused=fused)
        give_gradients(params.values(), 0)
        params["linear.weight"].grad[0, 0] = bad
        optimizer.step()
        ends.append(values(params))
    for name, fused in ends[0].items():
        torch.testing.assert_close(fused, ends[1][name], rtol=1e-5, atol=2e-7, equal_nan=True)
        if name != "linear.weight":
            assert fused.isfinite().all()


@both_kernels
def test_a_weight_that_is_not_finite_stays_so_and_spoils_no_other(device, optimizer_class):
    ends = []
    for fused in (True, False):
        params = on(device, layers())
        params["norm.bias"].data[0] = torch.inf
        walk(optimizer_class(groups(params), fused=fused), [0])
        ends.append(values(params))
        assert params["norm.bias"].isinf().tolist() == [True, False, False, False, False]
    close(*ends)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_without_decay_a_weight_that_is_not_finite_spoils_no_other_of_its_layer_in_lamb(device):
    ends = []
    for fused in (True, False):
        params = on(device, layers())
        params["linear.weight"].data[0, 0] = torch.inf
        walk(LAMB(groups(params), fused=fused, weight_decay=0.0, trust_clip=1.0), [0])
        ends.append(values(params))
        assert params["linear.weight"].isfinite().sum() == params["linear.weight"].numel() - 1
    close(*ends)


def with_gaps(dtype=torch.float32):
    # A copy to another device would close the gaps.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return {"layer": Parameter(whole[:, :3])}


NOT_FUSED = [
    ("torch", LAMB, {"bias_correction": False}, torch.float32, layers, "bias_correction=True"),
    ("torch", LAMB, {"grad_averaging": False}, torch.float32, layers, "grad_averaging=True"),
    (
        "torch",
        NovoGrad,
        {"betas": (0.0, 0.9)},
        torch.float32,
        layers,
        r"needs momentum \(betas\[0\] above 0\)",
    ),
    *(
        (kernels, optimizer_class, {}, dtype, own, reason)
        for kernels, optimizer_class in BOTH
        for dtype, own, reason in (
            (torch.float64, layers, "parameters are torch.float64"),
            (torch.float32, with_gaps, "dense in memory"),
        )
    ),
]


@pytest.mark.parametrize(
    ("kernels", "optimizer_class", "options", "dtype", "own", "reason"), NOT_FUSED, ids=named
)
def test_steps_without_a_kernel_are_unfused(device, kernels, optimizer_class, options, dtype, own, reason):
    with Calls(kernels) as calls:
        compare(device, optimizer_class, {**options, "fused": None}, dtype, layers=own)
    assert calls.count == 0


@pytest.mark.parametrize(
    ("kernels", "optimizer_class", "options", "dtype", "own", "reason"), NOT_FUSED, ids=named
)
def test_fused_is_refused_where_no_kernel_supports_the_step(
    device, optimizer_class, options, dtype, own, reason
):
    params = on(device, own(dtype))
    optimizer = optimizer_class(groups(params), fused=True, **options)
    before = values(params)
    give_gradients(params.values(), 0)
    with pytest.raises(RuntimeError, match=rf"fused=True, but .*{reason}.*pass fused=None"):
        optimizer.step()
    torch.testing.assert_close(values(params), before, rtol=0.0, atol=0.0)
    assert not optimizer.state


def test_a_gpu_without_triton_takes_unfused_steps(monkeypatch):
    monkeypatch.setattr(choice, "TRITON_DEVICES", {"cpu"})
    monkeypatch.setattr(choice, "is_triton_installed", lambda: False)
    reason = choice.why_not_fused([torch.ones(2)], [torch.ones(2)], [])
    assert reason == "fused steps on a GPU need triton, which is not installed (pip install triton)"


def test_other_devices_take_unfused_steps():
    on_meta = [torch.ones(2, device="meta")]
    assert "the parameters are on meta" in choice.why_not_fused(on_meta, on_meta, [])


def test_a_subclass_of_tensor_takes_unfused_steps():
    class Own(torch.Tensor):
        pass

    plain, own = torch.ones(2), torch.ones(2).as_subclass(Own)
    assert choice.why_not_fused([plain], [plain], [[plain]]) is None
    assert "subclass of Tensor" in choice.why_not_fused([plain], [own], [[plain]])
    assert "subclass of Tensor" in choice.why_not_fused([own], [plain], [[plain]])
    assert "plain float32" in choice.why_not_fused([plain], [plain], [[own]])
    assert "plain float32" in choice.why_not_fused([plain], [plain], [[plain.double()]])


def test_a_layer_whose_decay_would_cancel_the_kernels_first_half_takes_an_unfused_step():
    # lr * ratio * weight_decay = 1: the first half takes all that v is to be given.
    params = {"layer": Parameter(torch.tensor([3.0, 4.0]))}
    same = {"layer": Parameter(torch.tensor([3.0, 4.0]))}
    options = {"lr": 4.0, "weight_decay": 0.5, "trust_coefficient": 1.0, "trust_clip": 0.5, "nesterov": True}
    left, right = LARS(groups(params), **options), LARS(groups(same), fused=False, **options)
    for _ in range(2):
        for p in (*params.values(), *same.values()):
            p.grad = torch.tensor([0.1, 0.0])
        left.step()
        right.step()
        close(values(params), values(same))


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "dampening": 0.3, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.3, "nesterov": True, "lr_in_momentum": True},
        {"momentum": 0.9, "dampening": 0.3, "nesterov": True, "layer_adaptation": False},
        {"momentum": 0.9, "dampening": 0.3, "lr_in_momentum": True, "layer_adaptation": False},
    ],
    ids=str,
)
def test_torchs_kernel_takes_the_papers_step(options):
    torch.manual_seed(1)
    w, g, v = torch.randn(3, 50, dtype=torch.float64)
    lr, weight_decay, scale = 0.5, 0.1, 0.3 if options.get("layer_adaptation", True) else 1.0
    momentum, scale_in_v = options["momentum"], scale * lr if options.get("lr_in_momentum") else scale
    u = scale_in_v * (g + weight_decay * w)
    expected_v = momentum * v + (1 - options.get("dampening", 0.0)) * u
    ahead = u + momentum * expected_v if options.get("nesterov") else expected_v
    expected_w = w - (1.0 if options.get("lr_in_momentum") else lr) * ahead

    p = Parameter(w.float())
    p.grad = g.float()
    group = {"params": [p], **options}
    optimizer = LARS(
        [group], lr=lr, weight_decay=weight_decay, trust_clip=0.3, trust_coefficient=1e9, fused=True
    )
    if momentum:
        optimizer.state[p]["momentum_buffer"] = v.float()
    with Calls("torch") as calls:
        optimizer.step()
    assert calls.count > 0
    torch.testing.assert_close(p.detach().double(), expected_w, rtol=1e-6, atol=1e-6)
    if momentum:
        held = optimizer.state[p]["momentum_buffer"].double()
        torch.testing.assert_close(held, expected_v, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-38, 1e-34, 1e-25, 1e-10, 1e10, 1e25])
def test_novograd_is_fused_or_not_for_gradients_of_any_magnitude(magnitude):
    ends = []
    for fused in (True, False):
        params = layers()
        optimizer = NovoGrad(groups(params), eps=0.0, weight_decay=1e-4, fused=fused)
        for step in range(3):
            give_gradients(params.values(), step)
            for p in params.values():
                p.grad *= magnitude
                p.grad.view(-1)[0] = 0.0
            optimizer.step()
        ends.append((values(params), [optimizer.state[p]["exp_avg"] for p in params.values()]))
    (fused_values, fused_moments), (unfused_values, unfused_moments) = ends
    close(fused_values, unfused_values)
    torch.testing.assert_close(fused_moments, unfused_moments, rtol=1e-5, atol=1e-8)


@both_kernels
def test_a_rate_beyond_float32_raises_nothing(kernels, device, optimizer_class):
    options = {"denominator": "momentum", "eps": 0.0} if optimizer_class is LARS else {}
    w = Parameter(torch.full((3,), 1e30, device=device))
    optimizer = optimizer_class([w], lr=1e30, fused=True, **options)
    w.grad = torch.tensor([1e-30, 0.0, 0.0], device=device)
    optimizer.step()
    assert w[0].isneginf()
