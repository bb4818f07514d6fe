"""Why a ratio is what it is: the layers at their clip, and those without a scale."""

from functools import partial

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB, LARS


def step(optimizer_class, **options):
    """Step four layers with norms of weights and gradient 1 and 1, 8 and 1, 0 and 1, 1 and 0."""
    sizes = {"even": (1, 1), "large": (8, 1), "empty": (0, 1), "resting": (1, 0)}
    params = {name: Parameter(torch.tensor([float(w), 0.0])) for name, (w, _) in sizes.items()}
    for name, (_, g) in sizes.items():
        params[name].grad = torch.tensor([0.0, float(g)])
    optimizer = optimizer_class(params.items(), lr=0.5, weight_decay=0.0, **options)
    optimizer.step()
    return optimizer


def names(flags):
    assert all(flag.dtype == torch.bool and flag.shape == () for flag in flags.values())
    assert list(flags) == ["even", "large", "empty", "resting"]
    return [name for name, flag in flags.items() if flag]


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_reports_the_zero_rule_for_layers_without_weights_or_gradient(optimizer_class):
    assert names(step(optimizer_class).at_zero_rule()) == ["empty", "resting"]


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_reports_a_step_from_zero_for_layers_of_zeros_with_a_gradient(optimizer_class):
    assert names(step(optimizer_class).from_zero()) == ["empty"]


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_without_decay_no_layer_moves_by_decay_alone(optimizer_class):
    assert names(step(optimizer_class).by_decay_alone()) == []


DECAYING = {
    "LARS": partial(LARS, lr=1.0),
    "decayed gradient": partial(LARS, lr=1.0, denominator="decayed_gradient"),
    "momentum": partial(LARS, lr=1.0, denominator="momentum"),
    "momentum, nesterov": partial(LARS, lr=1.0, denominator="momentum", nesterov=True),
    "momentum, dampening": partial(LARS, lr=1.0, denominator="momentum", dampening=0.9),
    "momentum, fast": partial(LARS, lr=15.0, denominator="momentum"),
    "no momentum": partial(LARS, lr=1.0, denominator="momentum", momentum=0.0),
    "clipped": partial(LARS, lr=1.0, trust_clip=0.01),
    "LAMB": partial(LAMB, lr=0.01),
    "LAMB, weight norm": partial(LAMB, lr=0.01, max_weight_norm=0.1),
}


@pytest.mark.parametrize("rule", DECAYING)
@pytest.mark.parametrize("weight_decay", [0.1, 1e-4, 1e-9])
@pytest.mark.parametrize("fused", [None, False])
def test_a_layer_without_a_gradient_is_moved_by_decay_alone(rule, weight_decay, fused):
    torch.manual_seed(0)
    params = {name: Parameter(torch.randn(5, 4)) for name in ("used", "unused", "absent")}
    optimizer = DECAYING[rule](params.items(), weight_decay=weight_decay, fused=fused)
    for _ in range(30):
        # Ten times the decay that momentum builds up.
        params["used"].grad = torch.randn(5, 4) * weight_decay * (100 if "momentum" in rule else 10)
        params["unused"].grad = torch.zeros(5, 4)
        optimizer.step()
        flags = {name: bool(flag) for name, flag in optimizer.by_decay_alone().items()}
        assert flags == {"used": False, "unused": True}


@pytest.mark.parametrize("rule", DECAYING)
def test_with_decoupled_decay_no_layer_is_moved_by_decay_alone(rule):
    w = Parameter(torch.ones(3))
    w.grad = torch.zeros(3)
    optimizer = DECAYING[rule]([("w", w)], weight_decay=0.1, decoupled_weight_decay=True)
    optimizer.step()
    assert not optimizer.by_decay_alone()["w"]
    assert not optimizer.from_zero()["w"]


def test_a_layer_that_has_left_the_groups_since_the_step_is_left_out():
    params = [Parameter(torch.ones(2)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(2)
    groups = [{"params": [("a", params[0])]}, {"params": [("b", params[1])]}]
    optimizer = LARS(groups)
    optimizer.step()
    optimizer.param_groups.pop()
    assert list(optimizer.trust_ratios()) == list(optimizer.by_decay_alone()) == ["a"]


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_before_the_first_step_nothing_is_reported(optimizer_class):
    optimizer = optimizer_class([Parameter(torch.ones(2))])
    assert optimizer.at_zero_rule() == optimizer.at_trust_clip() == {}
    assert optimizer.from_zero() == optimizer.by_decay_alone() == {}


@pytest.mark.parametrize(
    ("options", "clipped"),
    [
        ({}, []),
        ({"trust_clip": 4.0}, ["large"]),
        ({"trust_clip": 0.5}, ["even", "large", "empty", "resting"]),
        ({"trust_clip": "larc"}, ["even", "large", "empty", "resting"]),
        ({"trust_clip": "larc", "trust_coefficient": 0.1}, ["large", "empty", "resting"]),
    ],
    ids=str,
)
def test_reports_the_clip_of_lars_for_layers_whose_ratio_it_changed(options, clipped):
    # The ratios are 1, 8, 1 and 1 times the trust coefficient, the last two by the zero rule without it; larc
    # divides them by the learning rate of 0.5 and cuts at 1.
    assert names(step(LARS, **{"trust_coefficient": 1.0, "eps": 0.0, **options}).at_trust_clip()) == clipped


@pytest.mark.parametrize(
    ("trust_clip", "clipped"),
    [(None, []), (4.0, ["large"]), ((2.0, 4.0), ["even", "large", "empty", "resting"])],
)
def test_reports_the_clip_of_lamb_at_both_ends(trust_clip, clipped):
    assert names(step(LAMB, trust_clip=trust_clip).at_trust_clip()) == clipped


def test_a_ratio_that_is_not_a_number_is_not_reported_as_clipped():
    p = Parameter(torch.ones(2))
    p.grad = torch.tensor([torch.nan, 1.0])
    optimizer = LARS([("w", p)], trust_clip=1.0)
    optimizer.step()
    assert optimizer.trust_ratios()["w"].isnan()
    assert not optimizer.at_trust_clip()["w"]


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
@pytest.mark.parametrize("fused", [None, False])
def test_vectors_over_layers_say_what_the_methods_say_of_each(optimizer_class, fused):
    sizes = ((1, 1, float), (0, 1, None), (8, 1, None), (1, 0, float), (3, 2, None), (1, 1, None))
    named = []
    for number, (w, g, kind) in enumerate(sizes):
        p = Parameter(torch.tensor([float(w), 0.0], dtype=torch.float64 if kind else torch.float32))
        p.grad = torch.tensor([0.0, float(g)]).to(p)
        named.append((f"layer{number}", p))
    groups = [
        {"params": named[:4], "trust_clip": 0.01},
        {"params": named[4:5], "weight_decay": 0.1},
        {"params": named[5:], "layer_adaptation": False},
    ]
    optimizer = optimizer_class(groups, lr=0.5, fused=fused)
    assert optimizer.stacked_trust_ratios() is None
    optimizer.step()
    for left in (5, 4):
        stacked = optimizer.stacked_trust_ratios()
        assert len(stacked.layers) == left
        for quantity, vector in zip(stacked._fields[1:], stacked[1:], strict=True):
            method = "trust_ratios" if quantity == "trust_ratio" else quantity
            expected = getattr(optimizer, method)()
            assert dict(zip(stacked.layers, vector.tolist(), strict=True)) == {
                name: flag.item() for name, flag in expected.items()
            }
        # Regrouping may have moved a layer elsewhere since the step.
        del optimizer.param_groups[0]["params"][0], optimizer.param_groups[0]["param_names"][0]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.stacked_trust_ratios() is None
