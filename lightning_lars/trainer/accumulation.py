"""A number of batches to accumulate that may change after any optimizer step."""

from typing import Any

from lightning.pytorch import Trainer


class AccumulatedBatches(int):
    """A value of ``Trainer.accumulate_grad_batches`` that counts from any batch of the epoch.

    With a plain number ``k``, Lightning clears the gradients before batch ``i`` of an epoch if
    ``i % k == 0``, divides each loss by ``k``, and steps after batch ``i`` if ``(i + 1) % k == 0``. So steps
    begin at multiples of ``k``: a ``k`` that changes elsewhere leaves out batches, or gives them unequal
    weights. Here, remainders count from the first batch of the step: ``(i - first) % k``.

    Args:
        count: Batches in the step, at least 1.
        first: Index in the epoch of its first batch.

    Example:
        >>> from lightning_lars.trainer.accumulation import AccumulatedBatches
        >>> accumulated = AccumulatedBatches(3, first=4)
        >>> [i for i in range(12) if i % accumulated == 0], 6.0 / accumulated
        ([1, 4, 7, 10], 2.0)
    """

    first: int

    def __new__(cls, count: int, first: int = 0) -> "AccumulatedBatches":  # noqa: D102
        self = super().__new__(cls, count)
        self.first = first
        return self

    # Python asks the right operand first if its class is derived from that of the left one.
    def __rmod__(self, index: Any) -> Any:
        return (index - self.first) % int(self)

    @property
    def end(self) -> int:
        """Index of the batch after the last one of the step."""
        return self.first + self


def give_back(trainer: Trainer) -> None:
    """Set the accumulated batches to what they were, which ``BatchSizeSchedule`` requires to be 1."""
    if isinstance(trainer.accumulate_grad_batches, AccumulatedBatches):
        trainer.accumulate_grad_batches = 1
