"""Memory in which some layers after others are worked on."""

from torch import Tensor

from lightning_lars.sharding.norms import Tensors

# Elements up to which memory is kept for the next step: 16 MiB of float32.
_KEPT = 2**22


class Scratch:
    """Memory that is given out again and again.

    A large tensor that is new comes from the operating system page by page, which takes longer than to
    fill it.

    Example:
        >>> import torch
        >>> from lightning_lars.optim.scratch import Scratch
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
        memory = self._memory
        if memory is None or memory.numel() < sum(sizes) or not _are_alike(memory, tensors[0]):
            self._memory = None  # before there is more
            self._memory = memory = tensors[0].new_empty(sum(sizes))
        parts = memory[: sum(sizes)].split_with_sizes(sizes)
        return [
            part.as_strided(tensor.shape, tensor.stride())
            for part, tensor in zip(parts, tensors, strict=True)
        ]

    def hand_over(self) -> None:
        """Leave to the caller what was given out."""
        self._memory = None

    def shrink(self) -> None:
        """Keep only what is little."""
        if self._memory is not None and self._memory.numel() > _KEPT:
            self._memory = None


def _are_alike(memory: Tensor, tensor: Tensor) -> bool:
    return memory.dtype == tensor.dtype and memory.device == tensor.device
