"""State dicts: saved, loaded, taken over from torch.optim, and refused."""

import copy
import io

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from lightning_lars import LAMB, LARS
from tests.support import reference
from tests.support.layers import EXCLUDED, give_gradients, groups, layers, values, walk

both = pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


def assert_same_state_dict(actual, expected):
    assert_equal(actual["state"], expected["state"])
    assert actual["param_groups"] == expected["param_groups"]


def saved_and_read_again(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def torch_groups(params):
    """The groups of tests.support.layers for an optimizer of torch, which has no layer_adaptation."""
    return [{k: v for k, v in group.items() if k != "layer_adaptation"} for group in groups(params)]


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_loaded_optimizer_continues_bit_for_bit(optimizer_class, dtype, tensor_lr):
    params = layers(dtype)
    lr = torch.tensor(1.0) if tensor_lr else 1.0
    optimizer = optimizer_class(groups(params), lr=lr, weight_decay=0.1, max_grad_norm=0.5)
    walk(optimizer, range(3))
    checkpoint = saved_and_read_again({"params": values(params), "optimizer": optimizer.state_dict()})

    resumed = {name: Parameter(value) for name, value in checkpoint["params"].items()}
    fresh = optimizer_class(groups(resumed))
    fresh.load_state_dict(checkpoint["optimizer"])
    walk(optimizer, range(3, 6))
    walk(fresh, range(3, 6))
    assert_equal(values(resumed), values(params))
    assert_same_state_dict(fresh.state_dict(), optimizer.state_dict())
    assert_equal(fresh.trust_ratios(), optimizer.trust_ratios())


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_state_of_a_half_precision_parameter_is_loaded_in_float32(optimizer_class, dtype):
    params = layers(dtype)
    optimizer = optimizer_class(groups(params))
    walk(optimizer, range(2))
    fresh = optimizer_class(groups(layers(dtype)))
    fresh.load_state_dict(saved_and_read_again(optimizer.state_dict()))
    assert_equal(fresh.state_dict()["state"], optimizer.state_dict()["state"])
    held = {x.dtype for state in fresh.state.values() for x in state.values()}
    assert held == {torch.float32}


@both
def test_loading_does_not_modify_the_callers_state_dict(optimizer_class):
    optimizer = optimizer_class(groups(layers()))
    walk(optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    fresh = optimizer_class(groups(layers()))
    fresh.load_state_dict(saved)
    assert_same_state_dict(saved, kept)


@both
def test_trust_ratios_are_empty_after_loading(optimizer_class):
    optimizer = optimizer_class(groups(layers()))
    walk(optimizer, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.trust_ratios() == {}


def from_sgd(options):
    """Three steps of SGD, and a LARS on copies of its parameters that took over its checkpoint."""
    other = layers(torch.float64)
    sgd = torch.optim.SGD(torch_groups(other), lr=0.1, momentum=0.8, weight_decay=0.2, **options)
    walk(sgd, range(3))
    params = {name: Parameter(value) for name, value in values(other).items()}
    lars = LARS(groups(params), trust_coefficient=0.02)
    with pytest.warns(UserWarning, match="momentum belong to updates without trust ratios"):
        lars.load_state_dict(saved_and_read_again(sgd.state_dict()))
    return (params, lars), (other, sgd)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"foreach": True}, {"dampening": 0.5}], ids=str)
def test_excluded_layers_of_lars_continue_from_sgd_as_sgd_would(options):
    (params, lars), (other, sgd) = from_sgd(options)
    assert_equal(list(lars.state.values()), [dict(state) for state in sgd.state.values()])
    walk(lars, range(3, 6))
    walk(sgd, range(3, 6))
    for name in EXCLUDED:
        assert_equal(params[name], other[name])


def test_adapted_layers_of_lars_continue_from_the_momentum_of_sgd():
    (params, lars), (_, sgd) = from_sgd({})
    before = {name: p.detach().clone().numpy() for name, p in params.items()}
    buffers = {name: lars.state[p]["momentum_buffer"].clone().numpy() for name, p in params.items()}
    give_gradients(params.values(), 3)
    lars.step()
    lr = sgd.param_groups[0]["lr"]
    options = {"lr": lr, "momentum": 0.8, "weight_decay": 0.2, "trust_coefficient": 0.02}
    for name, ratio in lars.trust_ratios().items():
        p, g = params[name], params[name].grad.numpy()
        w, _, expected = reference.lars(before[name], g, {"momentum_buffer": buffers[name]}, **options)
        torch.testing.assert_close(p.detach(), torch.as_tensor(w), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(ratio.item(), expected, rtol=1e-12, atol=0.0)


def test_hyperparameters_that_sgd_lacks_survive_its_checkpoint():
    (_, lars), _ = from_sgd({})
    assert [group["layer_adaptation"] for group in lars.param_groups] == [True, False]
    assert [group["trust_coefficient"] for group in lars.param_groups] == [0.02, 0.02]
    assert [group["momentum"] for group in lars.param_groups] == [0.8, 0.8]
    assert [group["weight_decay"] for group in lars.param_groups] == [0.2, 0.0]


def test_a_checkpoint_of_sgd_without_momentum_starts_the_momentum_of_lars():
    params, other, fresh = layers(), layers(), layers()
    sgd = torch.optim.SGD(torch_groups(other), lr=0.1)
    walk(sgd, range(2))
    lars = LARS(groups(params), momentum=0.9)
    lars.load_state_dict(sgd.state_dict())
    for group in lars.param_groups:
        group["momentum"] = 0.9
    walk(lars, range(2))
    walk(LARS(groups(fresh), momentum=0.9), range(2))
    for name in params:
        if name not in EXCLUDED:
            assert_equal(params[name], fresh[name])


def from_adamw(options):
    """Three steps of AdamW, and a LAMB on copies of its parameters that took over its checkpoint."""
    other = layers(torch.float64)
    adamw = torch.optim.AdamW(torch_groups(other), lr=0.1, betas=(0.8, 0.95), weight_decay=0.2)
    walk(adamw, range(3))
    params = {name: Parameter(value) for name, value in values(other).items()}
    lamb = LAMB(groups(params), **options)
    with pytest.warns(UserWarning, match=r"the learning rate 0\.001 .*without trust ratios, 0\.0333333"):
        lamb.load_state_dict(saved_and_read_again(adamw.state_dict()))
    return (params, lamb), (other, adamw)


@pytest.mark.parametrize("decoupled", [False, True])
def test_excluded_layers_of_lamb_continue_from_adamw_as_adamw_would(decoupled):
    (params, lamb), (other, adamw) = from_adamw({"decoupled_weight_decay": decoupled})
    assert_equal(list(lamb.state.values()), [dict(state) for state in adamw.state.values()])
    walk(lamb, range(3, 6))
    walk(adamw, range(3, 6))
    for name in EXCLUDED:
        torch.testing.assert_close(params[name], other[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("decoupled", [False, True])
def test_hyperparameters_that_adamw_lacks_or_defines_otherwise_survive_its_checkpoint(decoupled):
    (_, lamb), _ = from_adamw({"decoupled_weight_decay": decoupled, "trust_eps": 0.1})
    assert [group["layer_adaptation"] for group in lamb.param_groups] == [True, False]
    assert [group["decoupled_weight_decay"] for group in lamb.param_groups] == [decoupled, decoupled]
    assert [group["trust_eps"] for group in lamb.param_groups] == [0.1, 0.1]
    assert [group["betas"] for group in lamb.param_groups] == [(0.8, 0.95), (0.8, 0.95)]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_excluded_layers_of_lamb_continue_from_adam_without_decay(amsgrad):
    """From AMSGrad without its largest second moments, as Adam from there."""
    other = layers(torch.float64)
    undecayed = [{**group, "weight_decay": 0.0} for group in torch_groups(other)]
    adam = torch.optim.Adam(undecayed, lr=0.1, amsgrad=amsgrad)
    walk(adam, range(3))
    saved = saved_and_read_again(adam.state_dict())
    for state in saved["state"].values():
        state.pop("max_exp_avg_sq", None)
    params = {name: Parameter(value) for name, value in values(other).items()}
    lamb = LAMB(groups(params))
    with pytest.warns(UserWarning, match="The state dict has no option of LAMB"):
        lamb.load_state_dict(saved)
    for group in adam.param_groups:
        group["amsgrad"] = False
    walk(lamb, range(3, 6))
    walk(adam, range(3, 6))
    for name in EXCLUDED:
        torch.testing.assert_close(params[name], other[name], rtol=1e-12, atol=1e-13)


def adamw_state():
    optimizer = torch.optim.AdamW(torch_groups(layers()))
    walk(optimizer, range(1))
    return optimizer.state_dict()


def amsgrad_state():
    optimizer = torch.optim.AdamW(torch_groups(layers()), amsgrad=True)
    walk(optimizer, range(1))
    return optimizer.state_dict()


def sgd_state():
    optimizer = torch.optim.SGD(torch_groups(layers()), momentum=0.9)
    walk(optimizer, range(1))
    return optimizer.state_dict()


def own_state(optimizer_class):
    optimizer = optimizer_class(groups(layers()))
    walk(optimizer, range(1))
    return copy.deepcopy(optimizer.state_dict())


def with_one_group(state_dict):
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    names = [name for group in state_dict["param_groups"] for name in group["param_names"]]
    group = {**state_dict["param_groups"][0], "params": ids, "param_names": names}
    return {**state_dict, "param_groups": [group]}


def with_a_parameter_less(state_dict):
    first, *others = state_dict["param_groups"]
    first = {**first, "params": first["params"][:-1], "param_names": first["param_names"][:-1]}
    return {**state_dict, "param_groups": [first, *others]}


def with_another_shape(state_dict):
    state = {i: dict(own) for i, own in state_dict["state"].items()}
    for key in set(state[1]) - {"step"}:
        state[1][key] = torch.zeros(2, 2)
    return {**state_dict, "state": state}


def with_a_bad_option(state_dict):
    first, second = state_dict["param_groups"]
    return {**state_dict, "param_groups": [first, {**second, "weight_decay": -1.0}]}


def with_a_list_for_a_tensor(state_dict):
    state = {i: {key: value.tolist() for key, value in own.items()} for i, own in state_dict["state"].items()}
    return {**state_dict, "state": state}


def without_a_part(state_dict):
    state = {i: dict(list(own.items())[1:]) for i, own in state_dict["state"].items()}
    return {**state_dict, "state": state}


def with_other_names(state_dict):
    first, second = state_dict["param_groups"]
    return {**state_dict, "param_groups": [{**first, "param_names": ["x", "y", "z"]}, second]}


FOREIGN = [
    (LARS, adamw_state, "'momentum' in its groups, .*a different optimizer"),
    (LAMB, sgd_state, "'betas' in its groups, .*a different optimizer"),
    (LAMB, amsgrad_state, "'max_exp_avg_sq'.*a different optimizer"),
    (LAMB, lambda: without_a_part(own_state(LAMB)), r"got \['exp_avg', 'exp_avg_sq'\]: it is incomplete$"),
    *(
        (optimizer_class, lambda change=change, own=optimizer_class: change(own_state(own)), match)
        for optimizer_class in (LARS, LAMB)
        for change, match in (
            (with_one_group, r"groups of the optimizer, with \[3, 1\] parameters, got groups of \[4\]"),
            (with_a_parameter_less, r"with \[3, 1\] parameters, got groups of \[2, 1\]"),
            (with_another_shape, r"\(5, 7\), got \(2, 2\)"),
            (with_a_list_for_a_tensor, r"must hold a tensor for '\w+' of parameter 'conv.weight', got \[\["),
            (with_other_names, "not have 'conv.weight', 'linear.weight', 'scale', and has 'x', 'y', 'z'"),
            (with_a_bad_option, "weight_decay must be at least 0.*, got -1.0"),
        )
    ),
]


@pytest.mark.parametrize(("optimizer_class", "foreign", "match"), FOREIGN)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(optimizer_class, foreign, match):
    params, other = layers(), layers()
    optimizer, twin = optimizer_class(groups(params)), optimizer_class(groups(other))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(own, 0.9) for own in (optimizer, twin)]
    for own, scheduler in zip((optimizer, twin), schedulers, strict=True):
        walk(own, range(2))
        scheduler.step()
    before, schedule = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(schedulers[0].state_dict())
    held, param_groups = list(optimizer.state.values()), list(optimizer.param_groups)
    ratios = optimizer.trust_ratios()
    saved = foreign()
    kept = copy.deepcopy(saved)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    assert_same_state_dict(saved, kept)
    assert_same_state_dict(optimizer.state_dict(), before)
    assert all(actual is old for actual, old in zip(optimizer.state.values(), held, strict=True))
    assert all(actual is old for actual, old in zip(optimizer.param_groups, param_groups, strict=True))
    assert_equal(optimizer.trust_ratios(), ratios)
    assert schedulers[0].state_dict() == schedule
    for scheduler in schedulers:
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in twin.param_groups]
    walk(optimizer, range(2, 4))
    walk(twin, range(2, 4))
    assert_equal(values(params), values(other))


def shard(values, mesh, placement):
    """The values as a parameter of FSDP2, with a gradient."""
    p = Parameter(distribute_tensor(values, mesh, [placement]))
    p.grad = distribute_tensor(torch.ones_like(values), mesh, [placement])
    return p


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_of_a_shard_has_its_layout_and_loads_again(optimizer_class, dtype, mesh):
    p = shard(torch.ones(4, 2, dtype=dtype), mesh, Shard(0))
    optimizer = optimizer_class([("w", p)], weight_decay=0.1)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = shard(p.full_tensor().detach(), mesh, Shard(0))
    fresh = optimizer_class([("w", resumed)], weight_decay=0.1)
    fresh.load_state_dict(saved)
    for key, value in fresh.state[resumed].items():
        assert value.dtype == torch.float32
        if key != "step":
            assert value.placements == p.placements
            assert value.shape == p.shape
    optimizer.step()
    fresh.step()
    assert_equal(resumed.full_tensor(), p.full_tensor())


@both
@pytest.mark.parametrize("layout", ["plain", "other"])
def test_state_in_another_layout_than_its_parameter_is_refused(optimizer_class, layout, mesh):
    whole = Parameter(torch.ones(4, 2))
    whole.grad = torch.ones(4, 2)
    source = whole if layout == "plain" else shard(torch.ones(4, 2), mesh, Replicate())
    optimizer = optimizer_class([("w", source)])
    optimizer.step()
    fresh = optimizer_class([("w", shard(torch.ones(4, 2), mesh, Shard(0)))], lr=0.5)
    with pytest.raises(ValueError, match=r"in the layout of its parameter.*set_optimizer_state_dict"):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state
    assert fresh.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (LAMB, {}),
        (LARS, {"dampening": 0.5}),
        (LARS, {"dampening": 0.5, "denominator": "decayed_gradient"}),
        (LARS, {"dampening": 0.5, "denominator": "momentum"}),
        (LARS, {"dampening": 0.5, "layer_adaptation": False}),
    ],
    ids=str,
)
def test_saving_before_the_first_step_does_not_change_the_steps_after_it(
    optimizer_class, options, fused, tensor_lr
):
    runs = []
    for saves in (False, True):
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2)
        lr = torch.tensor(0.1) if tensor_lr else 0.1
        group = {"params": module.named_parameters(), "weight_decay": 0.1, **options}
        optimizer = optimizer_class([group], lr=lr, fused=fused)
        if saves:
            # Which makes a step of its own, to see what state there is.
            state = get_optimizer_state_dict(module, optimizer)["state"]
            assert all(not value.any() for of_layer in state.values() for value in of_layer.values())
            assert state.keys() == {"weight", "bias"}
            assert optimizer.trust_ratios() == {}
        for batch in torch.ones(3, 4, 3):
            optimizer.zero_grad()
            module(batch).square().sum().backward()
            optimizer.step()
        runs.append([module.weight, module.bias, *optimizer.trust_ratios().values()])
    for actual, expected in zip(*runs, strict=True):
        assert torch.equal(actual, expected)
