"""The size of a micro-batch, what one process sees in one backward pass, and which batches have it."""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_lars.trainer.batch_size import per_device_batch_size


class MicroBatches:
    """Tells whether batches have the size that the train loader tells, or that they are said to have.

    Where batches do not show it, as no tensor has it as its first dimension, all but the last of an epoch are
    taken to have it.

    Args:
        size: Samples of a batch; None takes it from the train loader, or, where that does not tell it, from
            the first batch that is looked at.
    """

    def __init__(self, size: int | None) -> None:
        self._given = size
        self.forget()

    def forget(self) -> None:
        """Look again: the train loader may be another."""
        self._size: int | None = None
        self._show_size = False

    @property
    def size(self) -> int:
        """Samples of a batch, after the first look at one."""
        assert self._size is not None
        return self._size

    def is_full(self, trainer: Trainer, batch: Any) -> bool:
        """Return whether the batch at hand has that size.

        Raises:
            MisconfigurationException: If there is no telling what that is.
        """
        sizes = _first_dimensions(batch)
        if self._size is None:
            self._size = self._find(trainer, batch)
            self._show_size = self._size in sizes
        return self._size in sizes if self._show_size else not trainer.is_last_batch

    def _find(self, trainer: Trainer, batch: Any) -> int:
        if self._given is not None:
            return self._given
        try:
            return per_device_batch_size(trainer)
        except ValueError as silent:
            try:
                return extract_batch_size(batch)
            except (MisconfigurationException, RecursionError):
                raise MisconfigurationException(
                    "GradientNoiseScale finds a batch size neither in the train loader nor in the batch, "
                    f"a {type(batch).__name__}: pass batch_size"
                ) from silent


def _first_dimensions(batch: Any) -> set[int]:
    if isinstance(batch, Tensor):
        return set(batch.shape[:1])
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, list | tuple):
        return set()
    return {size for each in batch for size in _first_dimensions(each)}
