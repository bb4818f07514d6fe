"""Schedules of the effective batch size, and the optimizer steps that an epoch takes under one."""

from bisect import bisect_right
from collections.abc import Mapping
from itertools import islice
from typing import Literal, NamedTuple

from lightning_lars.learning_rate.batch_scaling import check_batch_size
from lightning_lars.rules import is_whole, require


def additive_growth(start: int, end: int, increment: int, every: int) -> dict[int, int]:
    """Return a ramp: a batch size that grows by the same increment, again and again.

    ::

        batch size(t) = min(start + increment * floor(t / every), end)

    GPT-3 and Megatron-LM ramp up the batch size like this over the first samples (Brown et al. 2020).

    Args:
        start: Effective batch size at first, at least 1.
        end: Effective batch size at last, at least ``start``.
        increment: Samples by which it grows, at least 1.
        every: Steps, or samples, between two increments, at least 1.

    Returns:
        The batch sizes, by the step or sample from which on they apply.

    Raises:
        ValueError: If an argument breaks its rule.

    Example:
        >>> from lightning_lars.learning_rate import additive_growth
        >>> additive_growth(start=32, end=128, increment=32, every=1000)
        {0: 32, 1000: 64, 2000: 96, 3000: 128}
    """
    _check_growth(start, end, every)
    check_batch_size("increment", increment)
    sizes = [*range(start, end, increment), end]
    return {n * every: size for n, size in enumerate(sizes)}


def multiplicative_growth(start: int, end: int, factor: int, every: int) -> dict[int, int]:
    """Return a batch size that is multiplied by the same factor, again and again.

    ::

        batch size(t) = min(start * factor ** floor(t / every), end)

    Smith et al. 2018, arXiv:1711.00489: multiplying the batch size where the learning rate would be divided
    follows the same learning curve in fewer steps.

    Args:
        start: Effective batch size at first, at least 1.
        end: Effective batch size at last, at least ``start``.
        factor: A whole number, at least 2.
        every: Steps, or samples, from one multiplication to the next, at least 1.

    Returns:
        The batch sizes, by the step or sample from which on they apply.

    Raises:
        ValueError: If an argument breaks its rule.

    Example:
        >>> from lightning_lars.learning_rate import multiplicative_growth
        >>> multiplicative_growth(start=32, end=256, factor=2, every=1000)
        {0: 32, 1000: 64, 2000: 128, 3000: 256}
    """
    _check_growth(start, end, every)
    require("factor", "a whole number, at least 2", factor, is_whole(factor) and factor >= 2)
    sizes = []
    while start < end:
        sizes.append(start)
        start *= factor
    return {n * every: size for n, size in enumerate([*sizes, end])}


def _check_growth(start: int, end: int, every: int) -> None:
    check_batch_size("start", start)
    check_batch_size("end", end)
    require("end", f"at least start={start}", end, end >= start)
    require("every", "a whole number above 0", every, is_whole(every) and every > 0)


class Progress(NamedTuple):
    """The optimizer steps that were taken, and the samples that they averaged over."""

    steps: int
    samples: int


class BatchSizes:
    """The effective batch size as a piecewise constant function of the steps, or samples, before the step.

    Args:
        batch_sizes: Batch sizes, at least 1, by the step or sample from which on they apply; one from 0 on.
        unit: What its keys count.

    Raises:
        ValueError: If an argument breaks its rule.

    Example:
        >>> from lightning_lars.learning_rate.batch_schedule import BatchSizes, Progress
        >>> batch_sizes = BatchSizes({0: 32, 1000: 64}, unit="samples")
        >>> batch_sizes.after(Progress(steps=31, samples=992)), batch_sizes.after(Progress(32, 1024))
        (32, 64)
    """

    def __init__(self, batch_sizes: Mapping[int, int], unit: Literal["steps", "samples"]) -> None:
        require("unit", '"steps" or "samples"', unit, unit in ("steps", "samples"))
        holds = isinstance(batch_sizes, Mapping) and 0 in batch_sizes
        require("batch_sizes", "a dict with a batch size from 0 on", batch_sizes, holds)
        for begin, size in batch_sizes.items():
            holds = is_whole(begin) and begin >= 0 and is_whole(size) and size > 0
            rule = f"batch sizes above 0 by the number of {unit}, at least 0, both whole,"
            require("batch_sizes", rule, {begin: size}, holds)
        self.unit = unit
        self.batch_sizes = dict(sorted(batch_sizes.items()))
        """The batch sizes, by the step or sample from which on they apply, in ascending order."""
        self._begins = [*self.batch_sizes]
        self._sizes = [*self.batch_sizes.values()]

    def after(self, progress: Progress) -> int:
        """Return the effective batch size of the next step."""
        return self._sizes[self._index(progress)]

    def epoch(self, progress: Progress, batches: int, samples_per_batch: int) -> Progress:
        """Return the progress after an epoch, the last step of which takes the batches that are left.

        Args:
            progress: The progress before the epoch.
            batches: Micro-batches in the epoch.
            samples_per_batch: Samples in a micro-batch, on all replicas together.
        """
        while batches > 0:
            index = self._index(progress)
            accumulated = min(batches, max(1, self._sizes[index] // samples_per_batch))
            samples = accumulated * samples_per_batch
            # All steps up to the next change at once: runs are long, and changes are few.
            steps = batches // accumulated
            for begin in islice(self._begins, index + 1, index + 2):
                left = begin - progress[self.unit == "samples"]
                steps = min(steps, left if self.unit == "steps" else -(-left // samples))
            progress = Progress(progress.steps + steps, progress.samples + steps * samples)
            batches -= steps * accumulated
        return progress

    def _index(self, progress: Progress) -> int:
        return bisect_right(self._begins, progress[self.unit == "samples"]) - 1
