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
    assert f"not finite, as weights or gradients are not: 'e' ({ratio})." in message
    assert "max_grad_norm" in message
    assert later == [[]] * 4


CAUSES = [
    ({"at_trust_clip": 1.0}, r"at trust_clip in every step: 'e' \(0.001\).*widen trust_clip"),
    ({"trust_ratio": 0.2}, r"far from that of the median layer \(0.001\): 'e' \(0.2\). Name in exclude"),
    ({"trust_ratio": 1e-6}, r"far from that of the median layer \(0.001\): 'e' \(1e-06\)"),
    ({"update_to_weight": 0.0}, "weights that do not move, at a learning rate above 0: 'e' .*bf16-mixed"),
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


def test_many_layers_of_one_cause_share_a_message():
    layers = [f"net.{i}.conv{j}.weight" for i in range(10) for j in (1, 2)]
    alerts = TrustRatioAlerts()
    (message,) = alerts.look({"trust_ratio": over_steps(dict.fromkeys(layers, math.nan))})
    assert "20 layers: 'net.[0-9].conv[1-2].weight'. Lower" in message
    assert alerts.look({"trust_ratio": over_steps(dict.fromkeys(layers, math.nan))}) == []
    (message,) = alerts.look({"trust_ratio": over_steps({**dict.fromkeys(layers, 1.0), "head": math.inf})})
    assert ": 'head' (inf)." in message


def test_layers_that_have_no_common_name_are_counted():
    clipped = {letter * 2: 0.1 * i for i, letter in enumerate("abcdefg", 1)}
    quantities = {
        "trust_ratio": over_steps(clipped),
        "at_trust_clip": over_steps(dict.fromkeys(clipped, 1.0)),
    }
    alerts = TrustRatioAlerts()
    *_, (message,) = [alerts.look(quantities) for _ in range(PATIENCE)]
    assert "7 layers (0.1 to 0.7): 'aa', 'bb', 'cc', 'dd' and 3 more. The clip" in message


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


@pytest.mark.parametrize(
    ("rates", "at"),
    [([0.3, 0.2, 0.1], None), ([0.1] * (PLATEAU + 2), None), ([0.1, 0.2, 0.1], 2)],
    ids=["past a peak that was before", "constant", "still rising"],
)
def test_a_resumed_training_is_told_of_no_peak_that_it_has_not_seen(rates, at):
    alerts = TrustRatioAlerts(is_resumed=True)
    looks = [alerts.look_at_peak([(lr, 1e-3)]) for lr in rates]
    assert [i for i, messages in enumerate(looks) if messages] == ([] if at is None else [at])
    assert alerts.look_at_peak([(0.1, 1e-3)], is_over=True) == []
