"""The norm of every layer, whole even where its tensor is a shard, accumulated in at least float32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lars.optim.shards import Shard, add_up

Tensors = list[Tensor] | tuple[Tensor, ...]
"""One tensor per layer."""


def layer_norms(tensors: Tensors) -> Tensor:
    """Return the L2 norm of every tensor without leaving the device.

    Args:
        tensors: One tensor per layer, of any shapes, all on one device and of one dtype.

    Returns:
        Norms of shape ``(layers,)`` on that device, in the dtype they were summed in.

    Example:
        >>> import torch
        >>> from lightning_lars.optim.norms import layer_norms
        >>> layer_norms([torch.tensor([[3.0, 4.0]]), torch.tensor(2.0)])
        tensor([5., 2.], dtype=torch.float64)
    """
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=accumulation_dtype(tensors[0])))


def whole_norms(parts: Sequence[Tensor | None], shards: Sequence[Shard]) -> list[Tensor]:
    """Return the L2 norm of every layer, of which each process holds a part.

    All processes that hold a part of any of the layers must call this, with the layers in the same order.
    One collective for each mesh dimension that divides layers, whatever their number.

    Args:
        parts: What of each layer is here, on any device and of any dtype; None where nothing is.
        shards: Where the rest of each layer is.

    Returns:
        0-d float64 tensors, on the device of their shard.
    """
    zeros = {
        device: torch.zeros((), dtype=torch.float64, device=device)
        for device in {shard.device for shard in shards}
    }
    squares = [zeros[shard.device] for shard in shards]
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, part in enumerate(parts):
        if part is not None:
            alike.setdefault((part.device, part.dtype), []).append(i)
    for indices in alike.values():
        norms = layer_norms([part for i in indices if (part := parts[i]) is not None])
        for i, square in zip(indices, norms.double().square().unbind(), strict=True):
            squares[i] = square.to(shards[i].device)
    return list(torch._foreach_sqrt(add_up(squares, shards)))


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which to add up a tensor.

    float64 on the CPU, where a float32 sum of ten million squares is off by up to a percent; elsewhere
    float32, whose sums are exact enough there, or float64 for float64 tensors.
    """
    on_cpu = tensor.device.type == "cpu"
    return torch.promote_types(tensor.dtype, torch.float64 if on_cpu else torch.float32)
