"""What a step of LARS and of LAMB does beside its arithmetic."""

import copy
import math
import pickle

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB, LARS
from tests.support.layers import give_gradients, groups, layers, values, walk

both = pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


@both
def test_step_returns_what_the_closure_returned(optimizer_class):
    optimizer = optimizer_class([Parameter(torch.ones(2))])
    assert optimizer.step(lambda: 4.5) == 4.5
    assert optimizer.step() is None


@both
def test_the_closure_runs_once_with_gradients_enabled(optimizer_class):
    enabled = []
    with torch.no_grad():
        optimizer_class([Parameter(torch.ones(2))]).step(lambda: enabled.append(torch.is_grad_enabled()))
    assert enabled == [True]


@both
def test_the_gradients_are_read_after_the_closure(optimizer_class):
    params, other = layers(), layers()
    give_gradients(other.values(), 0)
    optimizer_class(groups(other)).step()
    optimizer_class(groups(params)).step(closure=lambda: give_gradients(params.values(), 0))
    assert_equal(values(params), values(other))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"maximize": True, "max_grad_norm": 0.1}], ids=str)
def test_the_gradients_are_the_same_tensors_with_the_same_values_after_a_step(
    optimizer_class, dtype, options
):
    params = layers(dtype)
    optimizer = optimizer_class(groups(params), **options)
    for step in range(2):
        give_gradients(params.values(), step)
        grads = {name: p.grad for name, p in params.items()}
        before = values(grads)
        optimizer.step()
        assert all(params[name].grad is grad for name, grad in grads.items())
        assert_equal(grads, before)


@both
def test_zeroing_the_gradients_in_place_leaves_the_state_alone(optimizer_class):
    params = layers()
    optimizer = optimizer_class(groups(params))
    walk(optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad(set_to_none=False)
    assert_equal(optimizer.state_dict()["state"], before)


@both
def test_construction_does_not_modify_the_callers_dicts_and_lists(optimizer_class):
    given = groups(layers())
    kept = [{key: list(x) if key == "params" else x for key, x in group.items()} for group in given]
    lists = [group["params"] for group in given]
    optimizer = optimizer_class(given)
    walk(optimizer, range(1))
    assert given == kept
    assert all(group["params"] is params for group, params in zip(given, lists, strict=True))


@both
def test_add_param_group_does_not_modify_the_callers_dict(optimizer_class):
    optimizer = optimizer_class([Parameter(torch.ones(2))])
    pairs = [Parameter(torch.ones(2)), Parameter(torch.ones(3))]
    given = {"params": pairs, "lr": 0.5}
    optimizer.add_param_group(given)
    assert set(given) == {"params", "lr"}
    assert given["params"] is pairs
    assert len(pairs) == 2


@both
def test_a_tensor_lr_stays_the_same_tensor_with_the_same_value(optimizer_class):
    lr = torch.tensor(0.25)
    params = layers()
    optimizer = optimizer_class(params.items(), lr=lr)
    give_gradients(params.values(), 0)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert_equal(lr, torch.tensor(0.25))


@both
@pytest.mark.parametrize("lr", [torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_tensor_lr_steps_like_a_number(optimizer_class, lr, dtype):
    params, other = layers(dtype), layers(dtype)
    for own, own_lr in ((params, lr), (other, 0.25)):
        optimizer = optimizer_class(groups(own), lr=own_lr)
        for step in range(3):
            give_gradients(own.values(), step)
            optimizer.step()
    torch.testing.assert_close(values(params), values(other), rtol=1e-14, atol=1e-14)


@both
def test_lr_zero_moves_nothing(optimizer_class):
    params = layers()
    before = values(params)
    optimizer = optimizer_class(groups(params), lr=0.0, weight_decay=0.1)
    give_gradients(params.values(), 0)
    optimizer.step()
    assert_equal(values(params), before)


@both
def test_every_group_keeps_its_own_options(optimizer_class):
    """Two groups in one optimizer step like two optimizers with one group each."""
    together, apart = layers(), layers()
    first, second = {"lr": 0.3, "weight_decay": 0.1}, {"lr": 0.01, "eps": 0.1, "maximize": True}
    names = list(together)
    split = [(names[:2], first), (names[2:], second)]
    optimizers = [optimizer_class([{"params": [(n, together[n]) for n in own], **o} for own, o in split])]
    optimizers += [optimizer_class([(n, apart[n]) for n in own], **o) for own, o in split]
    for step in range(3):
        give_gradients(together.values(), step)
        give_gradients(apart.values(), step)
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(values(together), values(apart))


@both
def test_a_parameter_without_a_gradient_keeps_its_values_and_gets_no_state(optimizer_class):
    params = layers()
    before = values(params)
    optimizer = optimizer_class(groups(params), weight_decay=0.1)
    give_gradients(params.values(), 0)
    params["scale"].grad = params["norm.bias"].grad = None
    optimizer.step()
    for name in ("scale", "norm.bias"):
        assert_equal(params[name].detach(), before[name])
    assert set(optimizer.state) == {params["conv.weight"], params["linear.weight"]}


@both
def test_a_step_without_any_gradient_does_nothing(optimizer_class):
    params = layers()
    before = values(params)
    optimizer = optimizer_class(groups(params), max_grad_norm=1.0)
    optimizer.step()
    assert_equal(values(params), before)
    assert optimizer.trust_ratios() == {}


@both
def test_an_empty_parameter_changes_nothing_for_the_others(optimizer_class):
    params, other = layers(), layers()
    empty = Parameter(torch.empty(0, 3))
    walk(optimizer_class([*params.items(), ("empty", empty)]), range(2))
    walk(optimizer_class(other.items()), range(2))
    assert_equal(values(params), values(other))
    assert empty.shape == (0, 3)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scalar_parameter_steps_like_a_vector_of_one(optimizer_class, dtype):
    scalar, vector = Parameter(torch.tensor(0.7, dtype=dtype)), Parameter(torch.tensor([0.7], dtype=dtype))
    for p in (scalar, vector):
        walk(optimizer_class([p], weight_decay=0.1, max_grad_norm=0.5), range(3))
    assert_equal(scalar.detach().reshape(1), vector.detach())


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_state_is_in_float32_or_wider_whatever_the_shape(optimizer_class, dtype, max_grad_norm, tensor_lr):
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    params = layers(dtype)
    optimizer = optimizer_class(groups(params), lr=lr, max_grad_norm=max_grad_norm)
    walk(optimizer, range(2))
    held = {(key, x.dtype) for state in optimizer.state.values() for key, x in state.items() if key != "step"}
    wide = torch.promote_types(dtype, torch.float32)
    assert held == {(key, wide) for key in optimizer.state_keys - {"step"}}


@both
def test_one_group_may_span_devices(optimizer_class):
    params, other = layers(), layers()
    on_meta = Parameter(torch.empty(3, 2, device="meta"))
    on_meta.grad = torch.empty_like(on_meta)
    optimizer = optimizer_class([*params.items(), ("on_meta", on_meta)], weight_decay=0.1)
    give_gradients(params.values(), 0)
    optimizer.step()
    assert optimizer.trust_ratios()["on_meta"].device.type == "meta"
    alone = optimizer_class(other.items(), weight_decay=0.1)
    give_gradients(other.values(), 0)
    alone.step()
    assert_equal(values(params), values(other))


@both
def test_one_group_may_span_dtypes(optimizer_class):
    mixed = {"half": layers(torch.bfloat16)["conv.weight"], "full": layers()["linear.weight"]}
    apart = {"half": layers(torch.bfloat16)["conv.weight"], "full": layers()["linear.weight"]}
    optimizers = [optimizer_class(mixed.items()), *(optimizer_class([pair]) for pair in apart.items())]
    for step in range(3):
        give_gradients(mixed.values(), step)
        give_gradients(apart.values(), step)
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(values(mixed), values(apart))


@both
def test_a_group_added_after_the_first_step_starts_then(optimizer_class):
    params, other = layers(), layers()
    late = "linear.weight"
    optimizer = optimizer_class([(n, p) for n, p in params.items() if n != late], lr=0.1)
    give_gradients(params.values(), 0)
    optimizer.step()
    optimizer.add_param_group({"params": [(late, params[late])], "lr": 0.2})
    give_gradients(params.values(), 1)
    optimizer.step()

    alone = optimizer_class([other[late]], lr=0.2)
    give_gradients(other.values(), 1)
    alone.step()
    assert_equal(params[late].detach(), other[late].detach())
    assert late in optimizer.trust_ratios()


@both
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_continues_exactly(optimizer_class, copied):
    params = layers()
    optimizer = optimizer_class(groups(params), weight_decay=0.1)
    walk(optimizer, range(2))
    other, twin = copied((params, optimizer))
    walk(optimizer, range(2, 5))
    walk(twin, range(2, 5))
    assert_equal(values(params), values(other))
    assert_equal(optimizer.trust_ratios(), twin.trust_ratios())


@both
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["conv.weight", "scale", "norm.bias"])
def test_a_gradient_that_is_not_finite_spoils_no_other_layer(optimizer_class, max_grad_norm, bad, name):
    params, other = layers(), layers()
    for own, is_bad in ((params, True), (other, False)):
        optimizer = optimizer_class(groups(own), max_grad_norm=max_grad_norm, weight_decay=0.1)
        for step in range(2):
            give_gradients(own.values(), step)
            if is_bad:
                own[name].grad.view(-1)[0] = bad
            else:
                own[name].grad = None
            optimizer.step()
    del params[name], other[name]
    assert_equal(values(params), values(other))


@both
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_layers_of_zeros_start_moving(optimizer_class, weight_decay, max_grad_norm):
    params = layers()
    with torch.no_grad():
        for p in params.values():
            p.zero_()
    optimizer = optimizer_class(params.items(), weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    walk(optimizer, range(3))
    assert all(p.isfinite().all() and p.count_nonzero() == p.numel() for p in params.values())


@both
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_gradients_of_zeros_leave_finite_weights(optimizer_class, weight_decay, max_grad_norm):
    params = layers()
    before = values(params)
    optimizer = optimizer_class(
        params.items(), lr=0.1, weight_decay=weight_decay, max_grad_norm=max_grad_norm
    )
    for _ in range(3):
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    moved = [not torch.equal(p, before[name]) for name, p in params.items()]
    assert moved == [weight_decay > 0] * len(params)
    assert all(p.isfinite().all() for p in params.values())


@both
@pytest.mark.parametrize("skipped", [False, True])
def test_the_grad_scaler_skips_a_step_that_overflowed(optimizer_class, skipped):
    params = layers()
    before = values(params)
    optimizer = optimizer_class(groups(params))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = sum(p.square().sum() for p in params.values())
    scaler.scale(loss * (math.inf if skipped else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert [torch.equal(p, before[name]) for name, p in params.items()] == [skipped] * len(params)
    assert scaler.get_scale() == (4.0 if skipped else 8.0)


@both
def test_construction_checks_every_group_once(optimizer_class, monkeypatch):
    checked = []
    monkeypatch.setattr(optimizer_class, "check_combination", staticmethod(checked.append))
    optimizer = optimizer_class([{"params": [Parameter(torch.ones(2))], "lr": lr} for lr in range(9)])
    optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
    assert len(checked) == 10
