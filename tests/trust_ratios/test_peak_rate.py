"""The peak of a learning rate is recognized once it has passed, however the rate rises."""

import math

import pytest
import torch

from lightning_lars.trust_ratios.peak_rate import Peak, PeakRate, largest

CASES = {
    "still rising": ([1, 2, 3, 4], 100, False),
    "at the end, still rising": ([1, 2, 3, 4], 4, False),
    "rising once an epoch": ([1, 1, 1, 2, 2, 2, 3, 3, 3], 9, False),
    "risen once an epoch, then constant": ([1, 1, 1, 2, 2, 2, 2, 2, 2, 2], 100, True),
    "risen, then constant": ([1, 2, 3, 3, 3], 100, True),
    "one step after the peak": ([1, 2, 3, 2], 100, False),
    "two steps after the peak": ([1, 2, 3, 2, 1], 100, True),
    "falling from the first step on": ([3, 2], 100, True),
    "constant, not yet for half of the training": ([2] * 4, 9, False),
    "constant for half of the training": ([2] * 5, 9, True),
    "constant in a training without end": ([2] * 50, math.inf, False),
    "a dip on the way up": ([1, 2, 3, 2, 3, 4, 5], 100, False),
}


def peak_of(values):
    rate = PeakRate()
    for value in values:
        rate.update(value)
    return rate.read()


@pytest.mark.parametrize("case", CASES)
def test_it_has_passed_or_not(case):
    values, total_steps, has_passed = CASES[case]
    for scale in (1.0, torch.tensor(0.25), torch.tensor([0.5], dtype=torch.float64)):
        peak = peak_of([value * scale for value in values])
        assert peak.value == pytest.approx(max(values) * float(scale))
        assert peak.steps == len(values)
        assert peak.has_passed(total_steps) is has_passed


def test_a_peak_of_before_a_resume_is_not_known():
    assert not peak_of([3, 2, 1]).has_passed(3, is_resumed=True)
    assert not peak_of([1, 1, 1]).has_passed(3, is_resumed=True)
    assert peak_of([1, 2, 1, 1]).has_passed(9, is_resumed=True)


def test_a_constant_rate_may_be_a_constant_warmup_of_the_planned_rate():
    assert not peak_of([1, 1, 1]).has_passed(3, plain=2.0)
    assert peak_of([1, 1, 1]).has_passed(3, plain=1.0)


def test_a_rate_on_a_device_is_followed_there():
    # A tensor of this device has no value: whoever reads one fails.
    rate = PeakRate()
    for _ in range(3):
        rate.update(largest([0.5, torch.ones((), device="meta")]))
    assert rate.state().device.type == "meta"


def test_it_is_read_from_its_state_too():
    rate = PeakRate()
    for value in (1.0, 3.0, 2.0):
        rate.update(value)
    assert rate.read() == rate.read(rate.state().tolist()) == Peak(3.0, 2.0, 1, 1, 3)


def test_the_largest_of_numbers_is_a_number_and_of_tensors_a_tensor():
    assert largest([1.0, 3.0, 2.0]) == 3.0
    assert largest([torch.tensor(1.0), torch.tensor([2.0])]) == torch.tensor(2.0)
    assert largest([torch.tensor(1.0), 3.0, torch.tensor([2.0])]) == torch.tensor(3.0)
