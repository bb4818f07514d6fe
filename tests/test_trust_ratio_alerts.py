"""Each cause is told once for each layer, and only where it is one."""

import math

import pytest

from lightning_lars.step_statistics import OverSteps
from lightning_lars.trust_ratio_alerts import PATIENCE, PLATEAU, TrustRatioAlerts


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
    }
    for quantity, value in changes.items():
        quantities[quantity]["e"] = value
    return {quantity: over_steps(values) for quantity, values in quantities.items()}


def told(looks):
    alerts = TrustRatioAlerts()
    return [alerts.look(look) for look in looks]


def test_healthy_layers_are_left_alone():
    assert told([healthy()] * 10) == [[]] * 10


@pytest.mark.parametrize("ratio", [math.nan, math.inf])
def test_a_ratio_that_is_not_finite_is_told_at_once_and_once(ratio):
    (message,), *later = told([healthy(trust_ratio=ratio)] * 5)
    assert f"layer 'e' is {ratio}" in message
    assert "max_grad_norm" in message
    assert later == [[]] * 4


CAUSES = [
    ({"at_trust_clip": 1.0}, "'e'.*at trust_clip in every step.*Raise trust_clip"),
    ({"trust_ratio": 0.2}, r"'e' \(0.2\) is far from that of the median layer \(0.001\).*exclude='e'"),
    ({"trust_ratio": 1e-6}, "'e'.*is far from that of the median layer"),
    ({"update_to_weight": 0.0}, "'e' do not move, at an effective learning rate of 0.001.*bf16-mixed"),
]


@pytest.mark.parametrize(("changes", "match"), CAUSES)
def test_what_lasts_is_told_once(changes, match):
    looks = told([healthy(**changes)] * (PATIENCE + 3))
    assert [len(messages) for messages in looks] == [0] * (PATIENCE - 1) + [1] + [0] * 3
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(looks[PATIENCE - 1][0])


@pytest.mark.parametrize(("changes", "match"), CAUSES)
def test_what_passes_is_not_told(changes, match):
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
def test_what_is_no_cause_is_not_told(changes):
    assert told([healthy(**changes)] * 10) == [[]] * 10


def test_no_layers_are_nothing_to_tell():
    assert told([{}]) == [[]]


@pytest.mark.parametrize(
    ("rates", "at"),
    [
        ([0.1, 0.2, 0.3, 0.2, 0.1], 3),
        ([0.1, 0.2, 0.2, 0.2], None),
        ([0.3, 0.6, 1.0, 0.5], None),
        ([0.1] * (PLATEAU + 2), PLATEAU),
        ([0.0, 0.0], None),
    ],
    ids=["past its peak", "may still rise", "large enough", "constant", "zero"],
)
def test_a_negligible_learning_rate_is_told_when_its_peak_is_known(rates, at):
    alerts = TrustRatioAlerts()
    looks = [alerts.look_at_peak([(lr, 1e-3), (lr / 2, 1e-3)]) for lr in rates]
    assert [i for i, messages in enumerate(looks) if messages] == ([] if at is None else [at])


def test_at_the_end_the_peak_is_known():
    alerts = TrustRatioAlerts()
    assert alerts.look_at_peak([(0.5, 1e-3)]) == []
    (message,) = alerts.look_at_peak([(0.5, 1e-3)], is_over=True)
    assert "0.0005 at its peak" in message
    assert alerts.look_at_peak([(0.5, 1e-3)], is_over=True) == []
