"""NovoGrad against its paper in float64, and with all that LARS has."""

import copy
import itertools

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB, LARS, NovoGrad, build_optimizer
from lightning_lars.optim.backends import choice
from lightning_lars.rules import FLAG
from tests.support import reference
from tests.support.layers import EXCLUDED, give_gradients, groups, layers, values, walk
from tests.support.releases import has

OPTIONS = [
    {},
    {"betas": (0.9, 0.5), "weight_decay": 0.1},
    {"betas": (0.0, 0.0), "eps": 0.1},
    {"grad_averaging": True, "weight_decay": 0.1},
    {"decoupled_weight_decay": True, "weight_decay": 0.1, "maximize": True},
    {"max_grad_norm": 1.0, "weight_decay": 0.01},
]
# Largest rounding of one step, of weights and state up to 4 in size.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def assert_paper(options, dtype, device="cpu", steps=4, tensor_lr=False, **more):
    """Step beside the reference, from what the optimizer holds, and compare weights, state and factors."""
    params = {name: Parameter(p.detach().to(device)) for name, p in layers(dtype).items()}
    lr = torch.tensor(0.1, dtype=torch.float64, device=device) if tensor_lr else 0.1
    optimizer = NovoGrad(groups(params), lr=lr, **options, **more)
    of_rule = {key: value for key, value in options.items() if key != "max_grad_norm"}
    for step in range(steps):
        give_gradients(params.values(), step)
        if step == 1:
            params["linear.weight"].grad.zero_()
        params["scale"].grad.mul_(0.0 if step == 0 else 1.0)
        for group in optimizer.param_groups:
            lr = 0.1 / (1 + step)
            group["lr"] = group["lr"].fill_(lr) if tensor_lr else lr
        before = {name: array(p) for name, p in params.items()}
        g = {name: array(p.grad) for name, p in params.items()}
        state = {
            name: {key: array(x) for key, x in optimizer.state.get(p, {}).items()}
            for name, p in params.items()
        }
        scale = reference.gradient_scale(g.values(), options.get("max_grad_norm"))
        optimizer.step()
        for name, p in params.items():
            adapted = name not in EXCLUDED
            own = {"lr": lr, "layer_adaptation": adapted, **({} if adapted else {"weight_decay": 0.0})}
            w, after, factor = reference.novograd(
                before[name], scale * g[name], state[name], **{**of_rule, **own}
            )
            close(p.detach(), w, TOLERANCE[dtype])
            assert optimizer.state[p].keys() == after.keys()
            for key, value in after.items():
                close(optimizer.state[p][key], value, TOLERANCE[optimizer.state[p][key].dtype])
            if adapted:
                assert optimizer.trust_ratios()[name].item() == pytest.approx(factor, rel=2e-6)


def array(values):
    return values.detach().to("cpu", torch.float64, copy=True).numpy()


def close(actual, expected, tolerance):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_novograd_follows_the_paper(options, dtype):
    assert_paper(options, dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_novograd_follows_the_paper_with_a_tensor_lr(options):
    assert_paper(options, torch.float64, tensor_lr=True)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("options", "dtype", "tensor_lr"),
    [*((options, torch.float32, False) for options in OPTIONS), (OPTIONS[1], torch.bfloat16, True)],
    ids=str,
)
def test_the_triton_kernel_follows_the_paper(options, dtype, tensor_lr, monkeypatch):
    pytest.importorskip("triton", minversion="3.3", reason="there is no triton for this system")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(choice, "TRITON_DEVICES", {device})
    assert_paper(options, dtype, device, 3, tensor_lr, fused=True)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_step_does_not_depend_on_the_scale_of_the_gradient(scale):
    params, other = layers(), layers()
    for own, factor in ((params, 1.0), (other, scale)):
        optimizer = NovoGrad(own.items(), eps=0.0)
        for step in range(3):
            give_gradients(own.values(), step)
            for p in own.values():
                p.grad *= factor
            optimizer.step()
    torch.testing.assert_close(values(params), values(other), rtol=1e-5, atol=1e-6)


def test_layers_without_a_gradient_so_far_stay_finite_and_say_why():
    params = layers()
    optimizer = NovoGrad(params.items(), eps=0.0, weight_decay=0.1)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(p.isfinite().all() for p in params.values())
    assert all(is_at.item() for is_at in optimizer.at_zero_rule().values())
    give_gradients(params.values(), 0)
    optimizer.step()
    assert not any(is_at.item() for is_at in optimizer.at_zero_rule().values())
    for ratio, p in zip(optimizer.trust_ratios().values(), params.values(), strict=True):
        torch.testing.assert_close(ratio, 1 / p.grad.norm())  # the first average is the first norm
    for flags in (optimizer.from_zero(), optimizer.by_decay_alone()):
        assert not any(is_so.item() for is_so in flags.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_continues_exactly(dtype):
    params = layers(dtype)
    optimizer = NovoGrad(groups(params), weight_decay=0.1)
    walk(optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    own = {name: Parameter(p.detach().clone()) for name, p in params.items()}
    resumed = NovoGrad(groups(own))
    resumed.load_state_dict(saved)
    for state in resumed.state.values():
        assert state["exp_avg_sq"].shape == ()
        assert {value.dtype for value in state.values()} == {torch.float32}
    walk(optimizer, range(3, 5))
    walk(resumed, range(3, 5))
    torch.testing.assert_close(values(own), values(params), rtol=0.0, atol=0.0)
    other_params, other = copy.deepcopy((params, optimizer))
    walk(optimizer, [5])
    walk(other, [5])
    torch.testing.assert_close(values(other_params), values(params), rtol=0.0, atol=0.0)


def test_state_of_another_optimizer_is_refused_and_changes_nothing():
    lamb, novograd = LAMB(layers().items()), NovoGrad(layers().items(), lr=0.3)
    walk(lamb, [0])
    walk(novograd, [0])
    saved = lamb.state_dict()
    for state in saved["state"].values():
        del state["step"]
    before = copy.deepcopy(novograd.state_dict())
    match = r"one number for 'exp_avg_sq' .* got a tensor of shape \(4, 3, 3, 3\)"
    with pytest.raises(ValueError, match=match):
        novograd.load_state_dict(saved)
    after = novograd.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0.0, atol=0.0)


@pytest.mark.skipif(not has("torch>=2.7"), reason="torch 2.6 cannot compile a step")
def test_a_compiled_step_is_one_graph_equal_to_the_eager_step():
    torch.compiler.reset()
    ends = []
    for compiles in (False, True):
        params = layers()
        optimizer = NovoGrad(
            groups(params), lr=torch.tensor(0.1), weight_decay=0.1, max_grad_norm=1.0, fused=False
        )
        step = optimizer.step
        if compiles:
            step = torch.compile(step, fullgraph=True, backend="eager")
        for number in range(3):
            give_gradients(params.values(), number)
            step()
        ends.append((values(params), optimizer.trust_ratios()))
    torch.compiler.reset()
    torch.testing.assert_close(*ends, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("betas", (1.0, 0.9)), ("betas", (0.9,)), ("betas", 0.9), ("eps", -1.0), ("lr", -0.1),
        ("weight_decay", float("nan")), ("grad_averaging", 1), ("max_grad_norm", 0.0), ("fused", "cuda"),
    ],
)  # fmt: skip
def test_an_argument_out_of_range_is_refused(argument, value):
    with pytest.raises(ValueError, match=f"^{argument} must be "):
        NovoGrad([Parameter(torch.ones(2))], **{argument: value})


def test_groups_of_a_module_exclude_norms_and_biases():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = build_optimizer(network, NovoGrad, lr=0.1, weight_decay=0.01)
    assert [group["name"] for group in optimizer.param_groups] == ["adapted", "excluded"]
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert list(optimizer.trust_ratios()) == ["0.weight"]


def test_a_dtensor_on_a_mesh_steps_as_a_plain_tensor(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    plain, ends = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), []
    for sharded in (False, True):
        w = Parameter(distribute_tensor(plain, mesh, [Shard(0)]) if sharded else plain.clone())
        optimizer = NovoGrad([("w", w)], weight_decay=0.1)
        for step in range(3):
            g = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            w.grad = distribute_tensor(g, mesh, [Shard(0)]) if sharded else g
            optimizer.step()
        ends.append([w.detach(), optimizer.state[w]["exp_avg_sq"], optimizer.trust_ratios()["w"]])
    for whole, part in itertools.zip_longest(*ends):
        part = part.full_tensor() if hasattr(part, "full_tensor") else part
        torch.testing.assert_close(part, whole, rtol=1e-6, atol=1e-7)


def test_each_optimizer_has_rules_for_all_its_arguments():
    for optimizer_class in (LARS, LAMB, NovoGrad):
        arguments = set(optimizer_class.__init__.__annotations__) - {"params", "return"}
        assert optimizer_class.RULES.keys() == arguments | {"layer_adaptation"}
        assert optimizer_class.RULES["maximize"] is FLAG
