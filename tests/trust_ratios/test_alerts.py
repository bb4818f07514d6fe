"""Each cause is reported once per layer, and only where it applies."""

import math

import pytest
import torch

from lightning_lars.trust_ratios.alerts import PATIENCE, TrustRatioAlerts
from lightning_lars.trust_ratios.layer_statistics import OverSteps
from lightning_lars.trust_ratios.peak_rate import PeakRate


def over_steps(values):
    return {layer: OverSteps(value, value, value) for layer, value in values.items()}


def healthy(**changes):
    """Five layers as they should be, but for what is changed of the layer ``e``."""
    quantities = {
        "trust_ratio": dict.fromkeys("abcde", 1e-3),
        "effective_lr": dict.fromkeys("abcde", 1e-3),
        "update_to_weight": dict.fromkeys("abcde", 1e-3),
        "at_trust_clip": dict.fromkeys("abcde", 0.0),
        "at_zero_rule": dict.fromkeys("abcde", 0.0),
        "by_decay_alone": dict.fromkeys("abcde", 0.0),
        "lost_to_decay": dict.fromkeys("abcde", 0.0),
        "lr_from_zero": dict.fromkeys("abcde", 0.0),
    }
    for quantity, value in changes.items():
        quantities[quantity]["e"] = value
    return {quantity: over_steps(values) for quantity, values in quantities.items()}


def told(looks):
    alerts = TrustRatioAlerts()
    return [alerts.check(look) for look in looks]


def test_healthy_layers_are_left_alone():
    assert told([healthy()] * 10) == [[]] * 10


@pytest.mark.parametrize("ratio", [math.nan, math.inf])
def test_a_ratio_that_is_not_finite_is_reported_at_once_and_once(ratio):
    (message,), *later = told([healthy(trust_ratio=ratio)] * 5)
    assert f"not finite, because weights or gradients are not: 'e' ({ratio})." in message
    assert "max_grad_norm" in message
    assert later == [[]] * 4


CAUSES = [
    (
        {"at_trust_clip": 1.0},
        r"at trust_clip in every step since .*: 'e' \(0.001\).*widen or remove trust_clip",
    ),
    ({"trust_ratio": 0.2}, r"far from that of the median layer \(0.001\): 'e' \(0.2\). Add layers"),
    ({"trust_ratio": 1e-6}, r"far from that of the median layer \(0.001\): 'e' \(1e-06\)"),
    ({"update_to_weight": 0.0}, "weights that do not move, at a learning rate above 0: 'e' .*bf16-mixed"),
]


@pytest.mark.parametrize(("changes", "match"), CAUSES)
def test_persistent_conditions_are_reported_once(changes, match):
    looks = told([healthy(**changes)] * (PATIENCE + 3))
    assert [len(messages) for messages in looks] == [0] * (PATIENCE - 1) + [1] + [0] * 3
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(looks[PATIENCE - 1][0])


@pytest.mark.parametrize(("changes", "match"), CAUSES)
def test_transient_conditions_are_not_reported(changes, match):
    assert told(
        [healthy(**changes)] * (PATIENCE - 1) + [healthy()] + [healthy(**changes)] * (PATIENCE - 1)
    ) == ([[]] * (2 * PATIENCE - 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"at_trust_clip": 0.9},
        {"trust_ratio": 0.09},
        {"trust_ratio": 1.0, "at_zero_rule": 1.0},
        {"update_to_weight": 0.0, "effective_lr": 0.0},
    ],
    ids=["sometimes clipped", "not so far", "zero rule", "learning rate of zero"],
)
def test_normal_conditions_are_not_reported(changes):
    assert told([healthy(**changes)] * 10) == [[]] * 10


@pytest.mark.parametrize("since", [0.0, 0.9])
def test_a_clip_that_takes_effect_later_is_not_reported(since):
    assert told([healthy(at_trust_clip=since), *[healthy(at_trust_clip=1.0)] * 9]) == [[]] * 10


@pytest.mark.parametrize("options", [{"is_resumed": True}, {"clip_is_rule": True}], ids=str)
def test_a_clip_that_may_have_taken_effect_later_or_is_the_rule_is_not_reported(options):
    alerts = TrustRatioAlerts(**options)
    assert [alerts.check(healthy(at_trust_clip=1.0)) for _ in range(9)] == [[]] * 9


def test_a_clip_that_bounds_a_layer_without_weights_or_gradient_is_not_reported():
    for flag in ("at_zero_rule", "by_decay_alone"):
        assert told([healthy(at_trust_clip=1.0, trust_ratio=0.9, **{flag: 1.0})] * 9) == [[]] * 9


def test_a_layer_that_decay_alone_moves_is_reported_when_it_has_lost_a_tenth():
    look = healthy(by_decay_alone=1.0, lost_to_decay=0.03, trust_ratio=20.0)
    looks = told([look] * 12)
    assert [len(messages) for messages in looks] == [0] * 3 + [1] + [0] * 8
    assert "weight decay alone moves, because they have no gradient: 'e' (20). The trust ratio" in looks[3][0]
    assert "decoupled_weight_decay=True, with which they lose lr * weight_decay per step" in looks[3][0]


def test_steps_between_checks_count():
    look = healthy(by_decay_alone=1.0, lost_to_decay=0.01)
    look["lost_to_decay"]["e"] = OverSteps(0.01, 0.01, 0.01, steps=6)
    assert list(map(len, told([look] * 3))) == [0, 1, 0]


def test_a_layer_that_has_a_gradient_most_of_the_time_is_not_reported_as_shrinking():
    alone = healthy(by_decay_alone=1.0, lost_to_decay=0.06)
    assert told([alone, healthy(by_decay_alone=0.5, lost_to_decay=0.03), alone, healthy()]) == [[]] * 4


@pytest.mark.parametrize(
    ("plain", "lr", "clip"), [("SGD", 0.6, "0.01"), ("SGD", 10.0, "0.01"), ("Adam", 0.06, "0.1")]
)
def test_a_fast_step_from_zero_is_reported_at_once_and_once(plain, lr, clip):
    alerts = TrustRatioAlerts(plain=plain)
    (message,) = alerts.check_first_steps({"a": 0.0, "e": lr})
    assert f"weights were all zero, with their learning rate in that step: 'e' ({lr:g})." in message
    assert f"that of plain {plain}" in message
    assert f"trust_clip={clip}" in message
    assert alerts.check(healthy(lr_from_zero=lr)) == []
    # Of a layer that comes later, or is zero again.
    assert len(TrustRatioAlerts(plain=plain).check(healthy(lr_from_zero=lr))) == 1


@pytest.mark.parametrize(("plain", "lr"), [("SGD", 0.5), ("Adam", 0.05)])
def test_a_slow_step_from_zero_is_not_reported(plain, lr):
    in_single_precision = torch.tensor(lr).item()
    assert TrustRatioAlerts(plain=plain).check_first_steps({"e": in_single_precision}) == []


def test_many_layers_of_one_cause_share_a_message():
    layers = [f"net.{i}.conv{j}.weight" for i in range(10) for j in (1, 2)]
    alerts = TrustRatioAlerts()
    (message,) = alerts.check({"trust_ratio": over_steps(dict.fromkeys(layers, math.nan))})
    assert "20 layers: 'net.[0-9].conv[1-2].weight'. Lower" in message
    assert alerts.check({"trust_ratio": over_steps(dict.fromkeys(layers, math.nan))}) == []
    (message,) = alerts.check({"trust_ratio": over_steps({**dict.fromkeys(layers, 1.0), "head": math.inf})})
    assert ": 'head' (inf)." in message


def test_layers_that_have_no_common_name_are_counted():
    clipped = {letter * 2: 0.1 * i for i, letter in enumerate("abcdefg", 1)}
    quantities = {
        "trust_ratio": over_steps(clipped),
        "at_trust_clip": over_steps(dict.fromkeys(clipped, 1.0)),
    }
    alerts = TrustRatioAlerts()
    *_, (message,) = [alerts.check(quantities) for _ in range(PATIENCE)]
    assert "7 layers (0.1 to 0.7): 'aa', 'bb', 'cc', 'dd' and 3 more. The clip" in message


def test_nothing_is_reported_without_layers():
    assert told([{}]) == [[]]


def peaks(rates):
    """What is known after each step."""
    peak = PeakRate()
    for rate in rates:
        peak.update(rate)
        yield peak.read()


def test_a_negligible_learning_rate_is_reported_once():
    alerts = TrustRatioAlerts()
    messages = [alerts.check_peak(peak, 20) for peak in peaks([1e-5, 1e-4, 5e-5, 4e-5, 3e-5])]
    assert [len(each) for each in messages] == [0, 0, 0, 1, 0]
    assert "trust_coefficient * lr is 0.0001 at its peak, so no layer moves by more than" in messages[3][0]
    assert (
        "about 0.01 % of its norm in a step, before momentum. LARS needs a larger learning rate"
        in messages[3][0]
    )


@pytest.mark.parametrize("total_steps", [99_000, 101_000, math.inf])
def test_it_is_not_reported_where_small_steps_lead_a_long_way(total_steps):
    alerts = TrustRatioAlerts()
    *_, told_last = [alerts.check_peak(peak, total_steps) for peak in peaks([1e-5, 1e-4, 5e-5, 4e-5])]
    assert len(told_last) == (total_steps < 1e5)


@pytest.mark.parametrize("value", [0.0, 5e-4, 1e-3])
def test_it_is_not_reported_where_it_is_large_enough_or_zero(value):
    alerts = TrustRatioAlerts()
    assert [alerts.check_peak(peak, 9) for peak in peaks([value] * 9)] == [[]] * 9


def test_without_groups_that_move_by_lr_there_is_no_peak():
    assert TrustRatioAlerts().check_peak(PeakRate().read(), 9) == []


def test_a_run_that_begins_below_its_plain_rate_has_not_seen_its_peak():
    last = [*peaks([1e-5] * 9)][-1]
    assert TrustRatioAlerts().check_peak(last, 9, lambda: 1e-2) == []
    assert len(TrustRatioAlerts().check_peak(last, 9, lambda: 1e-5)) == 1


def test_a_resumed_run_does_not_report_a_peak_that_it_has_not_seen():
    assert TrustRatioAlerts(is_resumed=True).check_peak([*peaks([3e-5, 2e-5])][-1], 2) == []
    assert len(TrustRatioAlerts(is_resumed=True).check_peak([*peaks([1e-5, 3e-5, 2e-5, 1e-5])][-1], 2)) == 1
