"""Schedules of the effective batch size, and the optimizer steps that an epoch takes under one."""

from bisect import bisect_right
from collections.abc import Mapping
from itertools import islice, pairwise
from typing import Literal, NamedTuple

from typing_extensions import override

from lightning_lars.rules import POSITIVE, as_int, is_whole, require


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
            rule = f"batch sizes above 0 by the number of {unit}, at least 0, both integers"
            require("batch_sizes", rule, {begin: size}, holds)
        self.unit = unit
        self.batch_sizes = dict(sorted((as_int(begin), as_int(size)) for begin, size in batch_sizes.items()))
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

    def observe(self, noise_scale: float) -> None:
        """Ignore the noise scale."""

    def state(self) -> dict[str, float]:
        """Return nothing: the progress says all."""
        return {}

    def load(self, state: Mapping[str, float]) -> None:
        """Ignore the state of a schedule that had one."""

    def _index(self, progress: Progress) -> int:
        return bisect_right(self._begins, progress[self.unit == "samples"]) - 1


class BatchSizesByNoiseScale(BatchSizes):
    """Effective batch sizes that follow one another as the gradient noise scale rises.

    ::

        the next batch size follows if   B_simple >= noise_scale * next batch size
                                  and if  `every` steps, or samples, have passed since the last change

    ``B_simple`` is the noise scale of McCandlish et al. 2018, arXiv:1812.06162, which estimates the critical
    batch size. It is noisy: both conditions, and that no batch size comes back, keep a schedule from
    oscillating.

    Args:
        batch_sizes: As those of :class:`BatchSizes`; of the keys, only their distance matters.
        unit: What its keys count.
        noise_scale: Above 0: 1 grows to a batch size when the critical one has reached it.

    Raises:
        ValueError: If an argument breaks its rule.

    Example:
        >>> from lightning_lars.learning_rate.batch_schedule import BatchSizesByNoiseScale, Progress
        >>> ladder = BatchSizesByNoiseScale({0: 32, 10: 64, 20: 128}, "steps", noise_scale=1.0)
        >>> ladder.observe(100.0)
        >>> [ladder.after(Progress(step, 0)) for step in (9, 10, 30)]
        [32, 64, 64]
        >>> ladder.observe(130.0)
        >>> ladder.after(Progress(31, 0))
        128
    """

    def __init__(
        self, batch_sizes: Mapping[int, int], unit: Literal["steps", "samples"], noise_scale: float
    ) -> None:
        super().__init__(batch_sizes, unit)
        POSITIVE.check("noise_scale", noise_scale)
        ascends = all(a < b for a, b in pairwise(self._sizes))
        require("batch_sizes", "ascending with noise_scale", self.batch_sizes, ascends)
        self.noise_scale = noise_scale
        self._level = self._since = 0
        self._b_simple = 0.0

    @override
    def after(self, progress: Progress) -> int:
        position = progress[self.unit == "samples"]
        following = self._level + 1
        if following < len(self._sizes):
            every = self._begins[following] - self._begins[self._level]
            reached = self._b_simple >= self.noise_scale * self._sizes[following]
            if reached and position - self._since >= every:
                self._level, self._since = following, position
        return self._sizes[self._level]

    @override
    def observe(self, noise_scale: float) -> None:
        """Take a measured noise scale, in samples."""
        self._b_simple = noise_scale

    @override
    def state(self) -> dict[str, float]:
        """Return the state, from which another instance continues exactly."""
        return {"level": self._level, "since": self._since, "noise_scale": self._b_simple}

    @override
    def load(self, state: Mapping[str, float]) -> None:
        """Continue from a state."""
        self._level, self._since = int(state.get("level", 0)), int(state.get("since", 0))
        self._level = min(self._level, len(self._sizes) - 1)
        self._b_simple = state.get("noise_scale", 0.0)
