"""LARS8bit and LAMB8bit take the steps of LARS and LAMB from state that torchao quantizes in between."""

import copy
import io
import math
import pickle
import sys
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import Parameter

from benchmarks.model_shapes import resnet50
from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit
from lightning_lars.optim.backends import choice
from tests.support import reference
from tests.support.eight_bit import needs_torchao
from tests.support.layers import give_gradients

needs_torchao()
torchao = pytest.importorskip("torchao.optim.subclass_8bit", reason="there is no torchao for this system")

CLASSES = [(LARS8bit, LARS), (LAMB8bit, LAMB)]
both = pytest.mark.parametrize(("eight_bit_class", "optimizer_class"), CLASSES)
OPTIONS = [
    (LARS8bit, LARS, {"weight_decay": 0.1}),
    (LARS8bit, LARS, {"weight_decay": 0.1, "fused": False}),
    (LARS8bit, LARS, {"nesterov": True, "dampening": 0.3}),
    (LARS8bit, LARS, {"denominator": "momentum", "weight_decay": 0.1}),
    (LARS8bit, LARS, {"denominator": "momentum", "nesterov": True}),
    (LARS8bit, LARS, {"denominator": "decayed_gradient", "lr_in_momentum": True, "trust_clip": "larc"}),
    (LARS8bit, LARS, {"decoupled_weight_decay": True, "weight_decay": 0.1, "max_grad_norm": 1.0}),
    (LARS8bit, LARS, {"momentum": 0.0}),
    (LAMB8bit, LAMB, {}),
    (LAMB8bit, LAMB, {"fused": False, "trust_clip": (0.1, 2.0)}),
    (LAMB8bit, LAMB, {"bias_correction": False, "max_grad_norm": 1.0}),
    (LAMB8bit, LAMB, {"grad_averaging": False, "decoupled_weight_decay": True, "maximize": True}),
]
SHAPES = {"wide": (8, 512), "deep": (32, 16, 3, 3), "odd": (67, 67), "small": (16, 16), "bias": (5,)}
IN_EIGHT_BITS = ("wide", "deep")


def layers(dtype=torch.float32, shapes=SHAPES):
    """The same parameters at every call, by name."""
    generator = torch.Generator().manual_seed(0)
    return {name: Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in shapes.items()}


def groups(params):
    """Adapted layers, and a group that is not."""
    adapted = [(name, p) for name, p in params.items() if name != "bias"]
    return [{"params": adapted}, {"params": [("bias", params["bias"])], "layer_adaptation": False}]


def build(optimizer_class, params, **options):
    return optimizer_class(groups(params), lr=0.1, **options)


def is_eight_bit(value):
    return isinstance(value, torchao.OptimState8bit)


def same(actual, expected):
    """Whether two states are equal to the bit."""
    if is_eight_bit(actual):
        return torch.equal(actual.codes, expected.codes) and torch.equal(actual.scale, expected.scale)
    return torch.equal(actual, expected)


def floats(state):
    """The state, dequantized."""
    return {
        p: {key: v.dequantize() if is_eight_bit(v) else v.clone() for key, v in of_layer.items()}
        for p, of_layer in state.items()
    }


def quantized(value, signed):
    """What torchao makes of a tensor."""
    zeros = torchao.OptimState8bit.zeros(value.shape, signed=signed)
    return zeros.copy_(value)


@pytest.mark.parametrize(("eight_bit_class", "optimizer_class", "options"), OPTIONS)
def test_a_step_is_that_of_32_bits_from_the_dequantized_state(eight_bit_class, optimizer_class, options):
    params, expected_params = layers(), layers()
    optimizer = build(eight_bit_class, params, **options)
    expected = build(optimizer_class, expected_params, **options)
    for step in range(4):
        for mine, other in zip(params.values(), expected_params.values(), strict=True):
            other.data.copy_(mine.data)
            if mine in optimizer.state:
                expected.state[other] = floats({mine: optimizer.state[mine]})[mine]
        give_gradients(params.values(), step)
        give_gradients(expected_params.values(), step)
        optimizer.step()
        expected.step()
        for name, p in params.items():
            torch.testing.assert_close(p, expected_params[name], rtol=0.0, atol=0.0)
            for key, value in optimizer.state[p].items():
                of_other = expected.state[expected_params[name]][key]
                assert is_eight_bit(value) == (name in IN_EIGHT_BITS and key != "step"), (name, key)
                if is_eight_bit(value):
                    of_other = quantized(of_other, signed=key != "exp_avg_sq")
                assert same(value, of_other), (name, key)
        assert optimizer.trust_ratios() == expected.trust_ratios()


@pytest.mark.parametrize(("eight_bit_class", "optimizer_class", "options"), OPTIONS)
def test_a_step_is_that_of_the_paper_from_the_dequantized_state(eight_bit_class, optimizer_class, options):
    rule = reference.lars if optimizer_class is LARS else reference.lamb
    of_rule = {key: v for key, v in options.items() if key not in ("fused", "max_grad_norm")}
    params = layers()
    optimizer = build(eight_bit_class, params, **options)
    for step in range(4):
        state = floats(optimizer.state)
        give_gradients(params.values(), step)
        grads = {name: p.grad.double().numpy() for name, p in params.items()}
        scale = reference.gradient_scale(grads.values(), options.get("max_grad_norm"))
        before = {name: p.detach().double().numpy() for name, p in params.items()}
        optimizer.step()
        for name, p in params.items():
            saved = {key: v.double().numpy() for key, v in state.get(p, {}).items()}
            adapted = name != "bias"
            w, after, ratio = rule(
                before[name], scale * grads[name], saved, lr=0.1, layer_adaptation=adapted, **of_rule
            )
            torch.testing.assert_close(p.detach().double(), torch.from_numpy(w), rtol=1e-6, atol=1e-6)
            if adapted:
                assert optimizer.trust_ratios()[name].item() == pytest.approx(ratio, rel=1e-6)
            assert optimizer.state[p].keys() == after.keys()
            if name in IN_EIGHT_BITS:
                for key in after.keys() - {"step"}:
                    # Half the widest step of the code book: 0.9 / 64 of the largest in a block, or 0.9 / 128.
                    blocks = torch.from_numpy(after[key]).view(-1, 256)
                    widest = blocks.abs().amax(1, keepdim=True) * 0.9 / (128 if key == "exp_avg_sq" else 64)
                    error = optimizer.state[p][key].dequantize().view(-1, 256) - blocks
                    assert (error.abs() <= 0.501 * widest).all(), (name, key)


def test_the_trust_ratio_of_lamb_is_that_of_the_dequantized_moments():
    params = layers()
    optimizer = LAMB8bit(params.items(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        give_gradients(params.values(), step)
        if step == 2:
            state = floats(optimizer.state)
            before = {name: p.detach().double() for name, p in params.items()}
        optimizer.step()
    for name, p in params.items():
        g, w = p.grad.double(), before[name]
        m = 0.9 * state[p]["exp_avg"].double() + 0.1 * g
        v = 0.999 * state[p]["exp_avg_sq"].double() + 0.001 * g * g
        u = m / (1 - 0.9**3) / ((v / (1 - 0.999**3)).sqrt() + 1e-6) + 0.1 * w
        ratio = (w.norm() / u.norm()).item()
        assert optimizer.trust_ratios()[name].item() == pytest.approx(ratio, rel=1e-6)


def test_the_trust_ratio_of_lars_is_that_of_the_dequantized_momentum():
    params = layers()
    optimizer = LARS8bit(params.items(), lr=0.1, weight_decay=0.1, denominator="momentum")
    for step in range(3):
        give_gradients(params.values(), step)
        if step == 2:
            state = floats(optimizer.state)
            before = {name: p.detach().double() for name, p in params.items()}
        optimizer.step()
    for name, p in params.items():
        w = before[name]
        v = 0.9 * state[p]["momentum_buffer"].double() + p.grad.double() + 0.1 * w
        ratio = (1e-3 * w.norm() / (v.norm() + 1e-8)).item()
        assert optimizer.trust_ratios()[name].item() == pytest.approx(ratio, rel=1e-6)


@both
def test_the_way_of_the_weights_stays_near_that_of_32_bits(eight_bit_class, optimizer_class):
    params, expected_params = layers(), layers()
    options = {"trust_coefficient": 0.1} if optimizer_class is LARS else {}
    optimizer = build(eight_bit_class, params, **options)
    expected = build(optimizer_class, expected_params, **options)
    start = layers()
    for step in range(20):
        give_gradients(params.values(), step)
        give_gradients(expected_params.values(), step)
        optimizer.step()
        expected.step()
    for name in IN_EIGHT_BITS:
        way = (expected_params[name] - start[name]).norm()
        assert 0 < (params[name] - expected_params[name]).norm() < 0.05 * way


@both
@pytest.mark.parametrize("layers", [60, pytest.param(None, marks=pytest.mark.slow)], ids=["first 60", "all"])
def test_the_state_of_a_resnet50_takes_a_quarter(eight_bit_class, optimizer_class, layers):
    def size(optimizer):
        optimizer.step()
        values = [v for state in optimizer.state.values() for v in state.values()]
        parts = [part for v in values for part in ((v.codes, v.scale, v.qmap) if is_eight_bit(v) else (v,))]
        return sum(part.untyped_storage().nbytes() for part in parts)

    params = [Parameter(torch.zeros(shape)) for shape in resnet50()[:layers]]
    for p in params:
        p.grad = torch.zeros_like(p)
    assert size(eight_bit_class(params)) <= 0.27 * size(optimizer_class(params))


@both
def test_a_checkpoint_continues_exactly(eight_bit_class, optimizer_class):
    params = layers()
    optimizer = build(eight_bit_class, params)
    for step in range(3):
        give_gradients(params.values(), step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_params = {name: Parameter(p.detach().clone()) for name, p in params.items()}
    resumed = build(eight_bit_class, resumed_params)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        for each, of_each in ((optimizer, params), (resumed, resumed_params)):
            give_gradients(of_each.values(), step)
            each.step()
        for name, p in params.items():
            assert torch.equal(p, resumed_params[name])
            for key, value in optimizer.state[p].items():
                assert same(resumed.state[resumed_params[name]][key], value)


@both
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_its_own_state_dict_goes_through_torch_distributed_checkpoint_more_than_once(
    eight_bit_class, optimizer_class, tmp_path
):
    params = layers()
    optimizer = build(eight_bit_class, params)
    give_gradients(params.values(), 0)
    optimizer.step()
    for number in range(2):
        dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / str(number))
        resumed_params = {name: Parameter(p.detach().clone()) for name, p in params.items()}
        resumed = build(eight_bit_class, resumed_params, eps=0.5)
        for p in resumed_params.values():
            p.grad = torch.zeros_like(p)
        resumed.step()  # it loads into state that exists
        for name, p in params.items():
            resumed_params[name].data.copy_(p)
        loaded = {"optimizer": resumed.state_dict()}
        dcp.load(loaded, checkpoint_id=tmp_path / str(number))
        resumed.load_state_dict(loaded["optimizer"])
        assert resumed.state.keys() == set(resumed_params.values())
        for each, of_each in ((optimizer, params), (resumed, resumed_params)):
            give_gradients(of_each.values(), number + 1)
            each.step()
        for name, p in params.items():
            assert torch.equal(p, resumed_params[name])
        params, optimizer = resumed_params, resumed


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_checkpoints_go_from_32_bits_to_8_and_back(eight_bit_class, optimizer_class, dtype):
    params = layers(dtype)
    optimizer = build(optimizer_class, params)
    for step in range(2):
        give_gradients(params.values(), step)
        optimizer.step()
    eight_bit = build(eight_bit_class, params)
    eight_bit.load_state_dict(optimizer.state_dict())
    back = build(optimizer_class, params)
    back.load_state_dict(eight_bit.state_dict())
    for name, p in params.items():
        for key, value in optimizer.state[p].items():
            if name in IN_EIGHT_BITS and key != "step":
                expected = quantized(value.float(), signed=key != "exp_avg_sq")
                assert same(eight_bit.state[p][key], expected)
                value = expected.dequantize().to(value.dtype)
            assert type(back.state[p][key]) is torch.Tensor
            assert back.state[p][key].dtype is value.dtype
            assert torch.equal(back.state[p][key], value)
    for each in (eight_bit, back):
        give_gradients(params.values(), 2)
        each.step()


def test_a_checkpoint_of_sgd_loads():
    params = layers()
    sgd = torch.optim.SGD(groups(params), lr=0.1, momentum=0.9)
    give_gradients(params.values(), 0)
    sgd.step()
    optimizer = build(LARS8bit, params)
    with pytest.warns(UserWarning, match="The state dict is from SGD"):
        optimizer.load_state_dict(sgd.state_dict())
    assert is_eight_bit(optimizer.state[params["wide"]]["momentum_buffer"])


def test_another_size_in_the_checkpoint_is_that_of_the_state():
    params = layers()
    optimizer = build(LARS8bit, params, min_8bit_size=256)
    give_gradients(params.values(), 0)
    optimizer.step()
    assert is_eight_bit(optimizer.state[params["small"]]["momentum_buffer"])
    resumed = build(LARS8bit, params)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["min_8bit_size"] == 256
    resumed.param_groups[0]["min_8bit_size"] = 4096
    resumed.step()
    assert type(resumed.state[params["small"]]["momentum_buffer"]) is torch.Tensor


@both
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike(eight_bit_class, optimizer_class, copied):
    params = layers()
    optimizer = build(eight_bit_class, params)
    give_gradients(params.values(), 0)
    optimizer.step()
    other_params, other = copied((params, optimizer))
    for of_each, each in ((params, optimizer), (other_params, other)):
        give_gradients(of_each.values(), 1)
        each.step()
    for name, p in params.items():
        assert torch.equal(p, other_params[name])
        for key, value in optimizer.state[p].items():
            assert same(other.state[other_params[name]][key], value)


def test_state_can_be_moved():
    params = layers()
    optimizer = build(LAMB8bit, params)
    give_gradients(params.values(), 0)
    optimizer.step()
    for state in optimizer.state.values():
        for key, value in state.items():
            moved = value.to("cpu", copy=True)
            assert same(moved, value)
            state[key] = moved
    give_gradients(params.values(), 1)
    optimizer.step()
    assert is_eight_bit(optimizer.state[params["wide"]]["exp_avg"])


@both
def test_weights_whose_rows_are_not_next_to_each_other(eight_bit_class, optimizer_class):
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        params = layers()
        params["deep"].data = params["deep"].data.to(memory_format=memory_format)
        optimizer = build(eight_bit_class, params, fused=True)
        for step in range(3):
            give_gradients(params.values(), step)
            optimizer.step()
        runs.append(params["deep"].detach())
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-6)


@both
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")
def test_kernels_in_triton_work_on_the_dequantized_state(eight_bit_class, optimizer_class, monkeypatch):
    pytest.importorskip("triton", minversion="3.3", reason="there is no triton for this system")
    monkeypatch.setattr(choice, "TRITON_DEVICES", {"cpu"})
    params, expected_params = layers(), layers()
    optimizer = build(eight_bit_class, params, fused=True)
    expected = build(eight_bit_class, expected_params, fused=False)
    for step in range(3):
        for of_each, each in ((params, optimizer), (expected_params, expected)):
            give_gradients(of_each.values(), step)
            each.step()
    for name, p in params.items():
        torch.testing.assert_close(p, expected_params[name], rtol=1e-4, atol=1e-4)
        for value in optimizer.state[p].values():
            assert is_eight_bit(value) == (name in IN_EIGHT_BITS and value.ndim > 0)


@both
def test_gradients_of_zero_and_layers_without_any(eight_bit_class, optimizer_class):
    params = layers()
    optimizer = build(eight_bit_class, params)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    params["deep"].grad = None
    optimizer.step()
    assert params["deep"] not in optimizer.state
    assert all(torch.isfinite(p).all() for p in params.values())


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_as_in_32_bits(eight_bit_class, optimizer_class, bad):
    params = layers()
    optimizer = build(eight_bit_class, params)
    give_gradients(params.values(), 0)
    params["wide"].grad[0, 0] = bad
    optimizer.step()
    give_gradients(params.values(), 1)
    optimizer.step()
    assert not torch.isfinite(params["wide"]).all()
    assert torch.isfinite(params["deep"]).all()


@both
def test_layers_that_are_frozen_or_empty_have_no_8_bit_state(eight_bit_class, optimizer_class):
    params = layers(shapes={"wide": (8, 512), "empty": (0, 256), "frozen": (8, 512)})
    params["frozen"].requires_grad_(False)
    frozen = params["frozen"].clone()
    optimizer = eight_bit_class(params.items(), min_8bit_size=0)
    for step in range(2):
        give_gradients([params["wide"], params["empty"]], step)
        optimizer.step()
    resumed = eight_bit_class(params.items(), min_8bit_size=0)
    resumed.load_state_dict(optimizer.state_dict())
    for each in (optimizer, resumed):
        assert torch.equal(params["frozen"], frozen)
        assert params["frozen"] not in each.state
        assert not any(map(is_eight_bit, each.state[params["empty"]].values()))
        assert any(map(is_eight_bit, each.state[params["wide"]].values()))


def test_second_moments_far_below_the_largest_of_their_block_are_held_as_zero():
    w = Parameter(torch.ones(16, 256))
    optimizer = LAMB8bit([w])
    w.grad = torch.ones(16, 256)
    w.grad[:, 0], w.grad[:, 1] = 1 / 2600, 1 / 2400
    optimizer.step()
    v = optimizer.state[w]["exp_avg_sq"].dequantize()
    assert not v[:, 0].any()
    assert v[:, 1:].all()
    assert optimizer.state[w]["exp_avg"].dequantize().all()


def test_gradients_that_unequal_lower_the_trust_ratio_of_lamb8bit():
    def ratio(optimizer_class, orders, **options):
        w = Parameter(torch.ones(16, 256))
        optimizer = optimizer_class([("w", w)], lr=0.0, weight_decay=0.0, **options)
        for step in range(20):
            give_gradients([w], step)
            w.grad *= torch.logspace(-orders, 0, 256)
            optimizer.step()
        return optimizer.trust_ratios()["w"].item()

    assert ratio(LAMB8bit, 0) == pytest.approx(ratio(LAMB, 0), rel=0.05)
    assert ratio(LAMB8bit, 5) < 0.5 * ratio(LAMB, 5)
    assert ratio(LAMB8bit, 5, min_8bit_size=10**6) == ratio(LAMB, 5)


@both
def test_a_trial_step_of_a_checkpoint_leaves_no_trace(eight_bit_class, optimizer_class):
    module = torch.nn.Linear(64, 64)
    optimizer = eight_bit_class(module.named_parameters(), weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        get_optimizer_state_dict(module, optimizer)
    for value in optimizer.state[module.weight].values():
        zeros = value.dequantize() if is_eight_bit(value) else value
        assert not zeros.any()
        assert is_eight_bit(value) == (value.ndim > 0)


@both
def test_groups_have_sizes_of_their_own(eight_bit_class, optimizer_class):
    params = layers()
    optimizer = eight_bit_class([{"params": [params["wide"]]}])
    optimizer.add_param_group({"params": [params["deep"]], "min_8bit_size": 10**6})
    give_gradients(params.values(), 0)
    optimizer.step()
    kinds = [any(map(is_eight_bit, optimizer.state[params[name]].values())) for name in ("wide", "deep")]
    assert kinds == [True, False]


@both
@pytest.mark.parametrize("size", [-1, 1.5, True, "4096", None])
def test_a_size_that_is_no_whole_number_is_refused(eight_bit_class, optimizer_class, size):
    with pytest.raises(ValueError, match="min_8bit_size must be an integer, at least 0, got"):
        eight_bit_class(layers().values(), min_8bit_size=size)


@both
def test_a_checkpoint_of_8_bits_loads_into_32_without_torchao(eight_bit_class, optimizer_class, monkeypatch):
    params = layers()
    optimizer = build(eight_bit_class, params)
    give_gradients(params.values(), 0)
    optimizer.step()
    expected = list(floats(optimizer.state).values())
    saved = optimizer.state_dict()
    fresh = build(optimizer_class, layers())
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    fresh.load_state_dict(saved)
    torch.testing.assert_close(list(map(dict, fresh.state.values())), expected, rtol=0.0, atol=0.0)
    assert "min_8bit_size" not in fresh.param_groups[0]


@both
def test_without_torchao_the_error_says_what_to_install(eight_bit_class, optimizer_class, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-lars\[8bit\]'"):
        eight_bit_class(layers().values())


@both
def test_a_step_makes_no_state_anew_and_copies_no_list_to_the_device(
    eight_bit_class, optimizer_class, monkeypatch
):
    params = layers()
    optimizer = build(eight_bit_class, params)
    give_gradients(params.values(), 0)
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values()]
    places = [value.codes.data_ptr() for value in held if is_eight_bit(value)]
    assert places
    monkeypatch.setattr(torch, "tensor", lambda data, **options: pytest.fail(f"a tensor of {data}"))
    give_gradients(params.values(), 1)
    optimizer.step()
    again = [value for state in optimizer.state.values() for value in state.values()]
    assert list(map(id, again)) == list(map(id, held))
    assert [value.codes.data_ptr() for value in again if is_eight_bit(value)] == places


@both
def test_8_bit_state_names_its_device(eight_bit_class, optimizer_class):
    params = layers()
    optimizer = build(eight_bit_class, params)
    give_gradients(params.values(), 0)
    with torch.device("meta"):
        optimizer.step()
    assert {v.device.type for state in optimizer.state.values() for v in state.values()} == {"cpu"}
