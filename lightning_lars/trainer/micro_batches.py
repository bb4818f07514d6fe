"""The size of a micro-batch, the samples of one backward pass on one rank, and which batches are full."""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_lars.trainer.batch_size import per_device_batch_size


class MicroBatches:
    """Recognizes full micro-batches, which have the nominal batch size.

    Where batches do not show their size, because no tensor has it as its first dimension, all but the last of
    an epoch are assumed to be full.

    Args:
        size: Samples in a batch; None takes it from the train loader or, where that has none, from the first
            batch that is checked.
    """

    def __init__(self, size: int | None) -> None:
        self._given = size
        self.reset()

    def reset(self) -> None:
        """Forget the size; the train loader may have changed."""
        self._size: int | None = None
        self._show_size = False

    @property
    def size(self) -> int:
        """Samples in a full batch, known after the first check."""
        assert self._size is not None
        return self._size

    def is_full(self, trainer: Trainer, batch: Any) -> bool:
        """Return whether the batch is full.

        Raises:
            MisconfigurationException: If the batch size cannot be determined.
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
        except ValueError as no_batch_size:
            try:
                return extract_batch_size(batch)
            except (MisconfigurationException, RecursionError):
                raise MisconfigurationException(
                    "GradientNoiseScale finds a batch size neither in the train loader nor in the batch, "
                    f"a {type(batch).__name__}: pass batch_size"
                ) from no_batch_size


def _first_dimensions(batch: Any) -> set[int]:
    if isinstance(batch, Tensor):
        return set(batch.shape[:1])
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, list | tuple):
        return set()
    return {size for each in batch for size in _first_dimensions(each)}
