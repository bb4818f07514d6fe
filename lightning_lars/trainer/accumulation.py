"""A number of batches to accumulate that may change after any optimizer step."""

from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_lars.class_names import has_class_named


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


def check_is_free(trainer: Trainer, pl_module: LightningModule) -> None:
    """Check that nothing but ``BatchSizeSchedule`` decides which batches a step accumulates.

    Raises:
        MisconfigurationException: If something else does.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "BatchSizeSchedule sets the batches that Lightning accumulates for a step, got "
            f"{type(pl_module).__name__} with automatic_optimization=False, where the module decides: use "
            "automatic optimization or remove the callback"
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            "BatchSizeSchedule sets accumulate_grad_batches, got Trainer(accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}): remove it from the Trainer"
        )
    for callback in cast(Any, trainer).callbacks:
        if has_class_named(callback, "GradientAccumulationScheduler"):
            raise MisconfigurationException(
                "BatchSizeSchedule and GradientAccumulationScheduler are mutually exclusive, because both "
                "set accumulate_grad_batches: remove one"
            )
        if has_class_named(callback, "LearningRateFinder"):
            raise MisconfigurationException(
                "BatchSizeSchedule and LearningRateFinder are mutually exclusive: the rate that is found is "
                "for a single micro-batch. Find it first, in a run with accumulate_grad_batches"
            )
    if trainer.strategy.handles_gradient_accumulation:
        raise MisconfigurationException(
            f"{type(trainer.strategy).__name__} accumulates gradients by itself, a number of batches that is "
            "fixed when training starts: use another strategy, such as 'fsdp', or remove BatchSizeSchedule"
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            "BatchSizeSchedule needs to know the batches of each step, got a training_step that fetches them "
            "from dataloader_iter: take batch and batch_idx instead, or remove the callback"
        )


def give_back(trainer: Trainer) -> None:
    """Set the accumulated batches to what they were, which :func:`check_is_free` required."""
    if isinstance(trainer.accumulate_grad_batches, AccumulatedBatches):
        trainer.accumulate_grad_batches = 1
