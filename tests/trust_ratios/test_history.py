"""What is kept of a run, however long it is."""

import math
from itertools import pairwise

import pytest
import torch

from lightning_lars.trust_ratios.history import TrustRatioHistory
from lightning_lars.trust_ratios.layer_statistics import OverSteps


def same(*values):
    """The quantities of a record, each the same over its steps."""
    return {"trust_ratio": {name: OverSteps(*[value] * 3) for name, value in values}}


def filled(records, max_records=8):
    history = TrustRatioHistory(max_records)
    for step in range(records):
        history.record(step, same(("a", float(step))))
    return history


@pytest.mark.parametrize("records", [1, 7, 8, 9, 16, 17, 100, 1000])
def test_keeps_evenly_spaced_records_of_the_whole_run(records):
    history = filled(records)
    assert len(history.steps) <= 8
    assert history.steps[0] == 0
    assert len({b - a for a, b in pairwise(history.steps)}) <= 1
    # The last one is no further from the end than the records from each other.
    spacing = history.steps[1] if records > 1 else 1
    assert records - history.steps[-1] <= spacing
    assert records <= 8 or len(history.steps) > 4
    assert history.series("trust_ratio") == {"a": [float(step) for step in history.steps]}


def test_statistics_count_all_records():
    history = TrustRatioHistory(2)
    values = torch.rand(101, dtype=torch.float64)
    for step, value in enumerate(values.tolist()):
        history.record(step, {"trust_ratio": {"a": OverSteps(value, value - 1, value + 1)}})
    statistics = history.statistics["trust_ratio"]["a"]
    assert statistics.mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert (statistics.minimum, statistics.maximum) == (values.min() - 1, values.max() + 1)
    assert (statistics.records, statistics.last) == (101, values[-1])


def test_a_layer_has_no_value_where_it_was_not_adapted_and_infinity_where_that_is_not_finite():
    history = TrustRatioHistory()
    history.record(1, same(("late", 1.0)))
    history.record(2, same(("early", math.nan), ("late", 1.0)))
    history.record(3, same(("early", 2.0)))
    history.set_order(["early", "late"])
    series = history.series("trust_ratio")
    assert list(series) == ["early", "late"]
    assert math.isnan(series["early"][0])
    assert series["early"][1:] == [math.inf, 2.0]
    assert series["late"][:2] == [1.0, 1.0]
    assert math.isnan(series["late"][2])


def test_the_learning_rate_follows_from_effective_rates_and_ratios():
    history = TrustRatioHistory()
    for step, lr in enumerate([0.5, 0.0, 3.0]):
        ratios = {"a": 0.1, "b": 0.01, "zero": 0.0, "sick": math.nan}
        record = same(*ratios.items())
        record["effective_lr"] = {
            # The second group has half the learning rate.
            name: OverSteps(*[ratio * lr * (0.5 if name == "b" else 1)] * 3)
            for name, ratio in ratios.items()
        }
        history.record(step, record)
    history.record(3, same(("a", math.nan)))
    assert history.learning_rates()[:3] == pytest.approx([0.5, 0.0, 3.0])
    assert math.isnan(history.learning_rates()[3])


@pytest.mark.parametrize("interrupted_after", [5, 11, 40])
def test_resuming_from_a_checkpoint_matches_an_uninterrupted_run(tmp_path, interrupted_after):
    before = filled(interrupted_after)
    torch.save(before.state_dict(), tmp_path / "state.pt")
    resumed = TrustRatioHistory(8)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(interrupted_after, 50):
        resumed.record(step, same(("a", float(step))))
    assert resumed.state_dict() == filled(50).state_dict()


def test_continues_from_a_longer_history():
    resumed = TrustRatioHistory(8)
    resumed.load_state_dict(filled(50, max_records=64).state_dict())
    resumed.record(50, same(("a", 50.0)))
    assert resumed.steps == [0, 8, 16, 24, 32, 40, 48]


@pytest.mark.parametrize("max_records", [0, -2, 3, 2.0])
def test_a_number_of_records_that_cannot_be_halved_is_refused(max_records):
    with pytest.raises(ValueError, match=f"max_records must be an even number above 0, got {max_records}"):
        TrustRatioHistory(max_records)
