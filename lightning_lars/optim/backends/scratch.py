"""Memory in which some layers after others are worked on."""

import threading

import torch
from torch import Tensor

from lightning_lars.sharding.norms import Tensors

# Elements up to which memory is kept for the next step: 16 MiB of float32.
_MAX_CACHED_ELEMENTS = 2**22


class _ThreadCache(threading.local):
    """The memory of this thread in which nobody works, which threads therefore need not lock.

    One for all optimizers, of which there may be one a layer, as where layers step in the backward pass.
    """

    def __init__(self) -> None:
        self.memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_cache = _ThreadCache()


class Scratch:
    """Memory that is given out again and again, and belongs to one step at a time.

    A large tensor that is new comes from the operating system page by page, which takes longer than to
    fill it.

    Example:
        >>> import torch
        >>> from lightning_lars.optim.backends.scratch import Scratch
        >>> scratch = Scratch()
        >>> first = scratch.like([torch.ones(2, 3), torch.ones(4)])
        >>> [tuple(tensor.shape) for tensor in first]
        [(2, 3), (4,)]
        >>> scratch.like([torch.ones(5)])[0].data_ptr() == first[0].data_ptr()
        True
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def like(self, tensors: Tensors) -> list[Tensor]:
        """Return for each of these a tensor that is laid out alike, with anything in it.

        Args:
            tensors: Of one dtype and device, without gaps in memory. What was given out before is no longer
                the caller's.
        """
        sizes = [tensor.numel() for tensor in tensors]
        if self._memory is None or _kind(self._memory) != _kind(tensors[0]):
            self.recycle()
            self._memory = _cache.memory.pop(_kind(tensors[0]), None)
        memory = self._memory
        if memory is None or memory.numel() < sum(sizes):
            self._memory = memory = None  # before there is more
            self._memory = memory = tensors[0].new_empty(sum(sizes))
        parts = memory[: sum(sizes)].split_with_sizes(sizes)
        return [
            part.as_strided(tensor.shape, tensor.stride())
            for part, tensor in zip(parts, tensors, strict=True)
        ]

    def release(self) -> None:
        """Leave to the caller what was given out."""
        self._memory = None

    def recycle(self) -> None:
        """Leave to the next step, of any optimizer, what is little, and keep nothing."""
        memory, self._memory = self._memory, None
        if memory is None or memory.numel() > _MAX_CACHED_ELEMENTS or memory.is_inference():
            return
        other = _cache.memory.get(_kind(memory))
        if other is None or other.numel() < memory.numel():
            _cache.memory[_kind(memory)] = memory


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device
