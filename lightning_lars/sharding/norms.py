"""L2 norms of whole layers, sharded or not, accumulated in at least float32."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_lars.sharding.shards import Shard, start_sums

Tensors = list[Tensor] | tuple[Tensor, ...]
"""One tensor per layer."""


# CPU tensors of this many elements or more are reduced faster in blocks of float32 than in float64
# throughout.
_LONG = 16384

# Elements of a CPU tensor that are accumulated in float32; the sums of blocks are accumulated in float64.
_BLOCK = 256

_WITHOUT_FLOAT64 = {"mps"}

# Norms for which no significant square overflows or underflows in float32.
_SQUARE_FITS = (1e-12, 1e18)


def layer_norms(tensors: Tensors) -> Tensor:
    """Return the L2 norm of every tensor, without a device-to-host copy.

    Args:
        tensors: One tensor per layer, of any shapes, all on one device and of one dtype.

    Returns:
        Norms of shape ``(layers,)`` on that device, in the dtype they were accumulated in.

    Example:
        >>> import torch
        >>> from lightning_lars.sharding.norms import layer_norms
        >>> layer_norms([torch.tensor([[3.0, 4.0]]), torch.tensor(2.0)])
        tensor([5., 2.], dtype=torch.float64)
    """
    if tensors[0].device.type == "cpu" and not torch.compiler.is_compiling():
        return _norms_on_cpu(tensors)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=accumulation_dtype(tensors[0])))


def _norms_on_cpu(tensors: Tensors) -> Tensor:
    """Return the norms in float64; long tensors are accumulated in float32 within each block."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    parts = [_norms_of_blocks(tensor, dtype) if tensor.numel() >= _LONG else tensor for tensor in tensors]
    norms = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float64))
    for i, norm in enumerate(norms.tolist()):
        if not _SQUARE_FITS[0] < norm < _SQUARE_FITS[1] and parts[i] is not tensors[i]:
            # Squares of such numbers are outside the range of float32.
            norms[i] = torch.linalg.vector_norm(tensors[i], dtype=torch.float64)
    return norms


def _norms_of_blocks(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norms of the blocks of a long tensor, each accumulated in this dtype."""
    flat = _flat(tensor)
    rest = flat.numel() % _BLOCK
    blocks = flat[:-rest] if rest else flat
    norms: Tensor = torch.linalg.vector_norm(blocks.view(-1, _BLOCK), dim=1, dtype=dtype)
    if rest:
        norms = torch.cat([norms, torch.linalg.vector_norm(flat[-rest:], dtype=dtype)[None]])
    return norms


def _flat(tensor: Tensor) -> Tensor:
    """Return the elements in memory order, which a norm does not depend on.

    This needs no copy where the tensor is dense.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.ndim), key=lambda d: -strides[d])).reshape(-1)


def stacked_norms(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the L2 norms of tensors, shape ``(len(tensors),)``, on this device.

    Devices and dtypes may be mixed; where they are not, this takes few operations, whatever the number of
    tensors.
    """
    if len(by_device_and_dtype(tensors)) == 1:
        norms = layer_norms(list(tensors))
        is_wide = norms.dtype == torch.float64
        return norms.to(device, widest_float(device) if is_wide else torch.float32)
    return on_device(norm_of_each(tensors), device)


def on_device(norms: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stack 0-d norms on a device, in float64 if one of them and the device have it, else in float32."""
    is_wide = any(norm.dtype == torch.float64 for norm in norms)
    dtype = widest_float(device) if is_wide else torch.float32
    return torch.stack([norm.to(device, dtype) for norm in norms])


def norm_of_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the L2 norm of every tensor, 0-d; devices and dtypes may be mixed."""
    norms: dict[int, Tensor] = {}
    for indices in by_device_and_dtype(tensors).values():
        norms.update(zip(indices, layer_norms([tensors[i] for i in indices]).unbind(), strict=True))
    return [norms[i] for i in range(len(tensors))]


def whole_norms(norms: Sequence[Tensor | None], shards: Sequence[Shard]) -> list[Tensor]:
    """Return what :func:`start_whole_norms` computes, without other work meanwhile."""
    return start_whole_norms(norms, shards)()


def start_whole_norms(norms: Sequence[Tensor | None], shards: Sequence[Shard]) -> Callable[[], list[Tensor]]:
    """Begin to compute the L2 norm of every sharded layer from the norms of its local shards.

    All ranks that hold a shard of any of the layers must call this, with the layers in the same order. It
    takes one all-reduce for each mesh dimension that shards layers, whatever their number.

    Args:
        norms: 0-d norms of the local shards, on any device; None where a rank holds no shard of a layer.
        shards: How each layer is sharded.

    Returns:
        A function, to be called once, that waits for the norms and returns them: 0-d tensors on the device of
        their shard, in float64 where the device supports it.
    """
    zeros = {
        device: torch.zeros((), dtype=widest_float(device), device=device)
        for device in {shard.device for shard in shards}
    }
    squares = [zeros[shard.device] for shard in shards]
    for indices in by_device_and_dtype(norms).values():
        local_norms = torch.stack([norm for i in indices if (norm := norms[i]) is not None])
        wide = local_norms.to(widest_float(local_norms.device))
        for i, square in zip(indices, wide.square().unbind(), strict=True):
            squares[i] = square.to(zeros[shards[i].device])
    finish = start_sums(squares, shards)
    return lambda: list(torch._foreach_sqrt(finish()))


def by_device_and_dtype(
    tensors: Sequence[Tensor | None],
) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Group the indices of tensors by device and dtype, for one foreach call each.

    Entries that are None are skipped.
    """
    indices: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor is not None:
            indices.setdefault((tensor.device, tensor.dtype), []).append(i)
    return indices


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which to accumulate the squares of a tensor.

    This is float64 where the device supports it: in float32 a sum of ten million squares is off by up to a
    percent on the CPU, and on GPUs squares below 1e-38 underflow.
    """
    return torch.promote_types(tensor.dtype, widest_float(tensor.device))


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on devices without double precision: MPS, and some Intel GPUs."""
    if device.type == "xpu":
        has_float64 = bool(torch.xpu.get_device_properties(device).has_fp64)
    else:
        has_float64 = device.type not in _WITHOUT_FLOAT64
    return torch.float64 if has_float64 else torch.float32
