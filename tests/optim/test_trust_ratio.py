"""The trust ratio equation, and what trust_ratios() tells about the last step."""

import itertools
import math

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB, LARS
from lightning_lars.optim.trust_ratio import clip, over_lr, trust_ratio
from tests.support.layers import EXCLUDED, SHAPES, give_gradients, groups, layers, walk

both = pytest.mark.parametrize("optimizer_class", [LARS, LAMB])


@pytest.mark.parametrize(("weight_norm", "denominator"), [(0.0, 2.0), (2.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_the_ratio_is_one_where_either_norm_is_zero(weight_norm, denominator, eps):
    norms = torch.tensor([weight_norm, 1.0]), torch.tensor([denominator, 1.0])
    ratios = trust_ratio(*norms, trust_coefficient=0.5, eps=eps)
    torch.testing.assert_close(ratios, torch.tensor([1.0, 0.5]))


def test_the_ratio_is_coefficient_times_weights_over_denominator_and_eps():
    ratios = trust_ratio(torch.tensor([3.0]), torch.tensor([1.0]), trust_coefficient=0.1, eps=0.5)
    torch.testing.assert_close(ratios, torch.tensor([0.2]))


NUMBERS = [0.0, 1e-300, 0.3, 1.0, 1e300, math.inf, math.nan]


@pytest.mark.parametrize(
    "equation",
    [
        lambda a, b: trust_ratio(a, b),
        lambda a, b: trust_ratio(a, b, trust_coefficient=1e-3, eps=1e-8),
        lambda a, b: clip(a, 0.0, 1.0),
        lambda a, b: clip(a, 0.5, 1e9),
        lambda a, b: over_lr(a, 0.1),
        lambda a, b: over_lr(a, 0),
    ],
)
def test_floats_and_tensors_give_the_same_ratio(equation):
    a, b = zip(*itertools.product(NUMBERS, NUMBERS), strict=True)
    one_by_one = torch.tensor([equation(*norms) for norms in zip(a, b, strict=True)], dtype=torch.float64)
    at_once = equation(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    torch.testing.assert_close(one_by_one, at_once, rtol=0.0, atol=0.0, equal_nan=True)


@both
def test_ratios_are_empty_before_the_first_step(optimizer_class):
    assert optimizer_class(groups(layers())).trust_ratios() == {}


@both
def test_ratios_carry_the_names_of_the_adapted_layers(optimizer_class):
    optimizer = optimizer_class(groups(layers()))
    walk(optimizer, range(1))
    assert list(optimizer.trust_ratios()) == [name for name in SHAPES if name not in EXCLUDED]


@both
def test_ratios_of_unnamed_parameters_carry_their_number_in_the_state_dict(optimizer_class):
    a, b, c = (Parameter(torch.ones(2)) for _ in range(3))
    optimizer = optimizer_class([{"params": [a], "layer_adaptation": False}, {"params": [b, c]}])
    walk(optimizer, range(1))
    assert list(optimizer.trust_ratios()) == ["1", "2"]
    numbers = [n for group in optimizer.state_dict()["param_groups"] for n in group["params"]]
    assert {str(n) for n in numbers} >= set(optimizer.trust_ratios())


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ratios_are_scalars_in_at_least_float32(optimizer_class, dtype):
    optimizer = optimizer_class(groups(layers(dtype)))
    walk(optimizer, range(1))
    ratios = optimizer.trust_ratios().values()
    assert {(r.shape, r.dtype) for r in ratios} == {((), torch.promote_types(dtype, torch.float32))}


@both
def test_ratios_leave_out_a_layer_without_a_gradient(optimizer_class):
    params = layers()
    optimizer = optimizer_class(groups(params))
    walk(optimizer, range(1))
    give_gradients(params.values(), 1)
    params["scale"].grad = None
    optimizer.step()
    assert list(optimizer.trust_ratios()) == ["conv.weight", "linear.weight"]


@both
def test_ratios_are_not_saved_with_the_state(optimizer_class):
    optimizer = optimizer_class(groups(layers()))
    walk(optimizer, range(1))
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert {key for state in saved["state"].values() for key in state} == optimizer.state_keys


@both
def test_ratios_stay_as_they_were_when_the_next_step_is_taken(optimizer_class):
    optimizer = optimizer_class(groups(layers()))
    walk(optimizer, range(1))
    first = optimizer.trust_ratios()
    before = {name: ratio.item() for name, ratio in first.items()}
    walk(optimizer, range(1, 3))
    assert {name: ratio.item() for name, ratio in first.items()} == before
    assert {name: ratio.item() for name, ratio in optimizer.trust_ratios().items()} != before


def test_the_length_of_a_lars_step_is_the_coefficient_times_the_weights():
    params = layers(torch.float64)
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = LARS(params.items(), lr=0.7, momentum=0.0, trust_coefficient=0.02, eps=0.0)
    give_gradients(params.values(), 0)
    optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close((p - before[name]).norm(), 0.7 * 0.02 * before[name].norm())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_length_of_a_lamb_step_is_lr_times_the_weights(weight_decay):
    params = layers(torch.float64)
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = LAMB(params.items(), lr=0.7, weight_decay=weight_decay)
    give_gradients(params.values(), 0)
    optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close((p - before[name]).norm(), 0.7 * before[name].norm())


def test_the_ratio_times_the_gradient_is_the_lars_step():
    params = layers(torch.float64)
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = LARS(params.items(), lr=0.7, momentum=0.0)
    give_gradients(params.values(), 0)
    optimizer.step()
    for name, ratio in optimizer.trust_ratios().items():
        p = params[name]
        torch.testing.assert_close(p.detach(), before[name] - 0.7 * ratio * p.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("of", ["weight", "gradient"])
@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_an_infinite_number_spoils_its_layer_and_no_other(optimizer_class, of, fused):
    spoiled, other, alone = (Parameter(torch.tensor([3.0, 4.0])) for _ in range(3))
    if of == "weight":
        spoiled.data[0] = math.inf
    optimizer = optimizer_class([spoiled, other], lr=0.1, weight_decay=0.01, fused=fused)
    expected = optimizer_class([alone], lr=0.1, weight_decay=0.01, fused=fused)
    for step in range(2):
        for p in (spoiled, other, alone):
            p.grad = torch.ones(2)
        if of == "gradient" and step == 0:
            spoiled.grad[0] = math.inf
        optimizer.step()
        expected.step()
        assert torch.equal(other, alone)
    assert spoiled.isnan().all()  # of SGD only the infinite element would be
    assert not optimizer.trust_ratios()["0"].isfinite()
