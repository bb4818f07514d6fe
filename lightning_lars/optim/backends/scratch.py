"""Scratch memory that the batches of a step share."""

import threading

import torch
from torch import Tensor

from lightning_lars.sharding.norms import Tensors

# The largest memory that is cached for the next step, in elements: 16 MiB of float32.
_MAX_CACHED_ELEMENTS = 2**22


class _ThreadCache(threading.local):
    """The unused memory of a thread, without a lock.

    All optimizers share it: there may be one for each layer, for updates during the backward pass.
    """

    def __init__(self) -> None:
        self.memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_cache = _ThreadCache()


class Scratch:
    """Memory that is reused by batch after batch and step after step.

    Reuse saves page faults: the operating system maps a large new tensor page by page, which takes longer
    than to fill it.

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
        """Return uninitialized tensors with the shapes and strides of these.

        This invalidates all tensors that were returned before, unless :meth:`release` was called.

        Args:
            tensors: Dense tensors of one dtype and device.
        """
        sizes = [tensor.numel() for tensor in tensors]
        if self._memory is None or _kind(self._memory) != _kind(tensors[0]):
            self.recycle()
            self._memory = _cache.memory.pop(_kind(tensors[0]), None)
        memory = self._memory
        if memory is None or memory.numel() < sum(sizes):
            self._memory = memory = None  # freed before more is allocated
            self._memory = memory = tensors[0].new_empty(sum(sizes))
        parts = memory[: sum(sizes)].split_with_sizes(sizes)
        return [
            part.as_strided(tensor.shape, tensor.stride())
            for part, tensor in zip(parts, tensors, strict=True)
        ]

    def release(self) -> None:
        """Leave the memory to the tensors that were returned last, which stay valid."""
        self._memory = None

    def recycle(self) -> None:
        """Give up the memory, and cache it for the next step of any optimizer if it is small."""
        memory, self._memory = self._memory, None
        if memory is None or memory.numel() > _MAX_CACHED_ELEMENTS or memory.is_inference():
            return
        other = _cache.memory.get(_kind(memory))
        if other is None or other.numel() < memory.numel():
            _cache.memory[_kind(memory)] = memory


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device
