"""Tracks the largest learning rate of a run in every step, and whether the peak has passed."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lars.sharding.norms import widest_float


class Peak(NamedTuple):
    """The largest value of a rate, and when it was reached."""

    value: float
    """The largest value so far."""
    last: float
    """The value of the last step."""
    since: int
    """Steps since the largest value was first reached."""
    longest_wait: int
    """The most steps between consecutive rises so far; 0 if it never rose."""
    steps: int
    """The number of steps."""

    def has_passed(self, total_steps: float, *, is_resumed: bool = False, plain: float = 0.0) -> bool:
        """Return whether no larger value is to be expected.

        False while the value rises, even if only once per epoch. A value that has never changed may be that
        of a constant warmup: it counts as the peak after half of the run, unless it is below the plain one.

        Args:
            total_steps: Steps of the whole run.
            is_resumed: Whether there were steps before: then a peak only counts if the rate has risen to it.
            plain: The rate without warmup, if it is known.
        """
        if self.longest_wait:
            return self.since > self.longest_wait
        if is_resumed:
            return False
        if self.last < self.value:
            return True
        return self.value >= plain * (1 - 1e-6) and 2 * self.steps >= total_steps


class PeakRate:
    """Tracks the peak of a rate on its device, without a device-to-host copy until it is read.

    Example:
        >>> from lightning_lars.trust_ratios.peak_rate import PeakRate
        >>> rate = PeakRate()
        >>> for value in (0.25, 0.5, 1.0, 0.75, 0.5):
        ...     rate.update(value)
        >>> rate.read()
        Peak(value=1.0, last=0.5, since=2, longest_wait=1, steps=5)
        >>> rate.read().has_passed(total_steps=10)
        True
    """

    def __init__(self) -> None:
        self._seen = torch.tensor([-math.inf, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64, device="cpu")

    def update(self, rate: float | Tensor) -> None:
        """Add a step; a tensor must have one element."""
        if isinstance(rate, Tensor) and rate.device != self._seen.device:
            self._seen = self._seen.to(rate.device, widest_float(rate.device), non_blocking=True)
        seen = self._seen
        # A Python number is filled in on the device, not copied to it.
        now = rate.detach().reshape(()).to(seen) if isinstance(rate, Tensor) else seen.new_full((), rate)
        value, _, since, longest_wait, steps = seen.unbind()
        has_begun, rises = steps > 0, now > value
        self._seen = torch.stack(
            [
                torch.maximum(value, now),
                now,
                torch.where(rises, 0, since + 1),
                torch.where(rises & has_begun, torch.maximum(longest_wait, since + 1), longest_wait),
                steps + 1,
            ]
        )

    def state(self) -> Tensor:
        """Return the 1-D state for :meth:`read`, for callers that copy it to the host with other values."""
        return self._seen

    def read(self, state: Sequence[float] | None = None) -> Peak:
        """Return the peak, by default with a separate device-to-host copy."""
        value, last, since, longest_wait, steps = self._seen.tolist() if state is None else state
        return Peak(value, last, int(since), int(longest_wait), int(steps))


def largest(rates: Sequence[float | Tensor]) -> float | Tensor:
    """Return the largest of numbers and one-element tensors; a number if all are numbers."""
    numbers = [rate for rate in rates if not isinstance(rate, Tensor)]
    tensors = [rate.reshape(()) for rate in rates if isinstance(rate, Tensor)]
    if not tensors:
        return max(numbers)
    largest_tensor = torch.stack([rate.to(tensors[0]) for rate in tensors]).max()
    return largest_tensor.clamp(min=max(numbers)) if numbers else largest_tensor
