"""A step takes over what the last one found out of its layers only if none of it has changed.

Every kind of change comes after a step that has taken it over, to one optimizer with kernels and to one
without, which must stay equal.
"""

import gc
import weakref

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB, LARS
from lightning_lars.optim.backends import choice
from tests.support.plans import Found, give_gradients
from tests.support.slow import slow_unless

pytest.importorskip("triton", minversion="3.3", reason="there is no triton for this system")


@pytest.fixture(autouse=True)
def _in_triton(monkeypatch, request):
    if not torch.cuda.is_available():
        request.getfixturevalue("small_chunks")
        monkeypatch.setattr(choice, "TRITON_DEVICES", {"cpu"})


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(optimizer_class, options):
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (3, 4), "square": (4, 4), "bias": (4,)}
    named = {
        name: Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for name, shape in shapes.items()
    }
    groups = [
        {"params": [named["weight"], named["square"]]},
        {"params": [named["bias"]], "layer_adaptation": False, "weight_decay": 0.0},
    ]
    return named, optimizer_class(groups, **{"lr": 0.1, "weight_decay": 0.1, **options})


def compare(optimizer_class, change, monkeypatch, steps=range(5), **options):
    """Change something before the fourth step, and return what each step has found from then on."""
    fused, unfused = (build(optimizer_class, {**options, "fused": fused}) for fused in (None, False))
    found = Found(monkeypatch)
    for step in steps:
        for params, optimizer in (fused, unfused):
            give_gradients(params, step)
            if step == 3:
                change(params, optimizer)
            optimizer.step()
        for name, p in fused[0].items():
            other = unfused[0][name]
            torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-6)
            state, expected = fused[1].state[p], unfused[1].state[other]
            assert state.keys() == expected.keys()
            for key, value in state.items():
                torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
        left, right = fused[1].trust_ratios(), unfused[1].trust_ratios()
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert found.steps[:1] == [True]  # the third step, as the first had no state yet
    return found.steps[1:]


def of_group(number=0, **values):
    return lambda params, optimizer: optimizer.param_groups[number].update(values)


def gradients_elsewhere(params, optimizer):
    for p in params.values():
        p.grad = p.grad.clone()


def lr_in_a_tensor(params, optimizer):
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.01, device=DEVICE)


def lr_at_an_odd_address(params, optimizer):
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor([0.1, 0.01], device=DEVICE)[1]


@pytest.mark.parametrize(
    ("optimizer_class", "change"),
    [
        slow_unless(False, LARS, of_group(lr=0.01)),
        slow_unless(False, LARS, of_group(momentum=0.5, weight_decay=0.2)),
        slow_unless(False, LARS, gradients_elsewhere),
        slow_unless(False, LARS, lr_in_a_tensor),
        (LAMB, of_group(lr=0.01, betas=(0.5, 0.6), weight_decay=0.2)),
        (LAMB, gradients_elsewhere),
        (LAMB, lr_at_an_odd_address),
    ],
)
def test_numbers_and_the_addresses_of_gradients_may_change(optimizer_class, change, monkeypatch):
    assert compare(optimizer_class, change, monkeypatch) == [True, True]


def without_a_gradient(params, optimizer):
    params["square"].grad = None


def with_a_transposed_gradient(params, optimizer):
    # Its memory, and so its address, is the same.
    grad = params["square"].grad
    grad.copy_(grad.t().clone())
    params["square"].grad = grad.t()


def gradient_transposed_in_place(params, optimizer):
    params["square"].grad.t_()


def weights_elsewhere(params, optimizer):
    params["weight"].data = params["weight"].data.clone()


def weights_transposed(params, optimizer):
    w = params["square"]
    w.data, w.grad = w.data.t(), w.grad.t()


def weights_in_another_dtype(params, optimizer):
    params["weight"].data = params["weight"].data.double()
    params["weight"].grad = params["weight"].grad.double()


def state_elsewhere(params, optimizer):
    state = optimizer.state[params["weight"]]
    for key, value in state.items():
        state[key] = value.clone()


def state_data_elsewhere(params, optimizer):
    for value in optimizer.state[params["weight"]].values():
        value.data = value.data.clone()


def state_transposed_in_place(params, optimizer):
    for value in optimizer.state[params["square"]].values():
        if value.ndim:
            value.t_()


def state_of_one_for_another(params, optimizer):
    state = optimizer.state
    state[params["weight"]], state[params["square"]] = (
        {**state[params["weight"]]},
        {key: value + 1 for key, value in state[params["square"]].items()},
    )


def moments_exchanged(params, optimizer):
    state = optimizer.state[params["weight"]]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"].square()


def without_state(params, optimizer):
    del optimizer.state[params["weight"]]


def with_a_loaded_state_dict(params, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def with_another_layer(params, optimizer):
    params["new"] = Parameter(torch.ones(5, device=DEVICE))
    params["new"].grad = torch.ones(5, device=DEVICE)
    optimizer.add_param_group({"params": [params["new"]]})


def with_a_layer_in_the_place_of_another(params, optimizer):
    new = Parameter(params["weight"].detach() + 1)
    new.grad = params["weight"].grad
    optimizer.param_groups[0]["params"][0] = params["weight"] = new


def without_a_layer(params, optimizer):
    optimizer.param_groups[0]["params"].pop()
    optimizer.state.pop(params.pop("square"))


CHANGES = (
    without_a_gradient,
    gradient_transposed_in_place,
    weights_elsewhere,
    weights_in_another_dtype,
    state_elsewhere,
    state_data_elsewhere,
    state_of_one_for_another,
    without_state,
    with_another_layer,
    with_a_layer_in_the_place_of_another,
    without_a_layer,
    of_group(trust_clip=1e-3),
    of_group(denominator="decayed_gradient"),
    of_group(1, layer_adaptation=True),
    of_group(weight_decay=0.0),
    of_group(momentum=0.0),
    of_group(decoupled_weight_decay=True),
    of_group(fused=False),
)


@pytest.mark.parametrize(
    ("optimizer_class", "change"),
    [
        *(slow_unless(False, LARS, change) for change in CHANGES),
        *(slow_unless(False, LAMB, change) for change in (state_elsewhere, without_state)),
        slow_unless(False, LAMB, of_group(bias_correction=False)),
        (LAMB, moments_exchanged),
        (LARS, with_a_transposed_gradient),
        (LARS, weights_transposed),
        (LARS, state_transposed_in_place),
        (LARS, of_group(layer_adaptation=False)),
    ],
)
def test_a_step_looks_again_where_a_layer_or_a_rule_has_changed(optimizer_class, change, monkeypatch):
    assert compare(optimizer_class, change, monkeypatch)[0] is False


@pytest.mark.parametrize(("betas", "takes_over"), [((0.5, 0.6), True), ((0.0, 0.6), False)])
def test_betas_in_a_list_may_change_in_place(betas, takes_over, monkeypatch):
    def change(params, optimizer):
        for group in optimizer.param_groups:
            group["betas"][:] = betas

    assert compare(LAMB, change, monkeypatch, betas=[0.9, 0.999])[0] is takes_over


def test_a_bound_on_all_gradients_may_come_and_move(monkeypatch):
    def bounded(params, optimizer):
        for group in optimizer.param_groups:
            group["max_grad_norm"] = 0.5

    assert compare(LARS, bounded, monkeypatch) == [False, True]


def test_a_loaded_state_dict_makes_a_plan_anew(monkeypatch):
    # The step after it does not look: there is no plan.
    assert compare(LARS, with_a_loaded_state_dict, monkeypatch) == [True]


def test_what_was_refused_is_refused_after_a_step_that_looked_at_nothing():
    for changed, message in (("weight", "must have the parameter's shape"), ("state", "shape")):
        params, optimizer = build(LARS, {})
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
        p = params["weight"]
        if changed == "weight":
            p.data = p.data[:2]  # at the same address
        else:
            momentum = optimizer.state[p]["momentum_buffer"]
            momentum.data = momentum.data[:2]
        before = [p.detach().clone() for p in params.values()]
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        for p, other in zip(params.values(), before, strict=True):
            torch.testing.assert_close(p, other, rtol=0.0, atol=0.0)


def test_a_gradient_of_another_dtype_at_the_same_address_is_looked_at_again(monkeypatch):
    params, optimizer = build(LARS, {"fused": True})
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    grad = params["weight"].grad
    grad.data = grad.data.view(torch.bfloat16)[:, :4]
    with pytest.raises(RuntimeError, match="their gradients are not"):
        optimizer.step()


def test_a_captured_step_takes_nothing_over(monkeypatch):
    from lightning_lars.optim import plan
    from lightning_lars.optim import step as steps
    from lightning_lars.optim.backends import triton_table

    params, optimizer = build(LAMB, {})
    found = Found(monkeypatch)
    for step in range(6):
        give_gradients(params, step)
        with monkeypatch.context() as capture:
            if step == 3:
                for module in (plan, steps, triton_table):
                    capture.setattr(module, "is_capturing", lambda device: True)
            optimizer.step()
            assert (optimizer._plan is None) == (step in (0, 3))
    assert found.steps == [True, False, True]


def test_a_step_on_another_stream_looks_again(monkeypatch):
    from lightning_lars.optim import plan

    params, optimizer = build(LARS, {})
    found = Found(monkeypatch)
    for step in range(5):
        give_gradients(params, step)
        monkeypatch.setattr(plan, "current_stream", lambda device, step=step: step // 3)
        optimizer.step()
    assert found.steps == [True, False, True]


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_a_plan_holds_on_to_no_gradient_and_no_state(optimizer_class):
    params, optimizer = build(optimizer_class, {})
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    assert optimizer._plan is not None
    held = [weakref.ref(p.grad) for p in params.values()]
    held += [weakref.ref(value) for state in optimizer.state.values() for value in state.values()]
    for p in params.values():
        p.grad = None
    optimizer.state.clear()
    gc.collect()
    assert all(tensor() is None for tensor in held)


def test_a_step_that_takes_over_tells_autograd_what_it_has_written_to():
    params, optimizer = build(LARS, {})
    for step in range(4):
        give_gradients(params, step)
        written = [*params.values(), *(optimizer.state[p]["momentum_buffer"] for p in optimizer.state)]
        before = [tensor._version for tensor in written]
        optimizer.step()
        assert all(tensor._version > old for tensor, old in zip(written, before, strict=True))
