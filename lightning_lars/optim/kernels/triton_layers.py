"""What the kernels for LARS and for LAMB have in common: reading layers through their table, and norms.

A program works on one chunk of a layer. Only a chunk that the end of its layer cuts needs a mask. A kernel
has its code twice, with a mask and without, as loads and stores without one are four times as wide.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lars.optim.kernels.layer_table import LayerTable

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCK = 1024
_CHUNKS_AT_ONCE = 256


@triton.jit
def address(columns, column, layer, layers, dtype: tl.constexpr, are_aligned: tl.constexpr):
    """Return where the tensor of a layer begins."""
    pointer = tl.load(columns + column * layers + layer).to(tl.pointer_type(dtype))
    if are_aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(pointer, mask, has_mask: tl.constexpr):
    """Return what lies there, in float32."""
    if has_mask:
        x = tl.load(pointer, mask=mask, other=0.0)
    else:
        x = tl.load(pointer)
    return x.to(tl.float32)


@triton.jit
def store(pointer, x, mask, has_mask: tl.constexpr):
    """Put it there, rounded to what is held there."""
    x = x.to(pointer.dtype.element_ty)
    if has_mask:
        tl.store(pointer, x, mask=mask)
    else:
        tl.store(pointer, x)


@triton.jit
def gradient(pointer, mask, has_mask: tl.constexpr, scale, has_scale: tl.constexpr, maximize: tl.constexpr):
    """Return the gradient to descend: turned round to climb, and clipped."""
    g = load(pointer, mask, has_mask)
    if maximize:
        g = -g
    if has_scale:
        g = g * tl.load(scale)
    return g


@triton.jit
def weights(pointer, mask, has_mask: tl.constexpr, lr, weight_decay, decoupled_weight_decay: tl.constexpr):
    """Return the weights, after the decay that comes first."""
    w = load(pointer, mask, has_mask)
    if decoupled_weight_decay:
        w = w * (1 - tl.load(lr) * weight_decay)
    return w


@triton.jit
def _norms(sums, norms, first_chunk, layers, chunks, rounds: tl.constexpr, chunks_at_once: tl.constexpr):
    layer = tl.program_id(0)
    row = tl.program_id(1)
    end = tl.load(first_chunk + layer + 1)
    total = tl.zeros([chunks_at_once], tl.float32)
    begin = tl.load(first_chunk + layer)
    for number in range(0, rounds):
        chunk = begin + number * chunks_at_once + tl.arange(0, chunks_at_once)
        total += tl.load(sums + row * chunks + chunk, mask=chunk < end, other=0.0)
    tl.store(norms + row * layers + layer, tl.sqrt(tl.sum(total, axis=0)))


def device_of(table: LayerTable) -> AbstractContextManager[object]:
    """Make the device of the layers the current one, to which Triton launches."""
    device = table.sizes.device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def norms(sums: Tensor, table: LayerTable) -> tuple[Tensor, Tensor]:
    """Return the norms of weights and direction, in a launch on the current device.

    Args:
        sums: Of squares over each chunk, shape ``(2, chunks)``, float32.
        table: Which chunks a layer has.

    Returns:
        Two tensors of shape ``(layers,)``, float32.
    """
    of_layers = sums.new_empty(2, table.layers)
    _norms[(table.layers, 2)](
        sums,
        of_layers,
        table.first_chunk,
        table.layers,
        table.chunks,
        rounds=triton.cdiv(table.most_chunks, _CHUNKS_AT_ONCE),
        chunks_at_once=_CHUNKS_AT_ONCE,
    )
    return of_layers[0], of_layers[1]


def no_norms(table: LayerTable) -> tuple[Tensor, Tensor]:
    """Return the norms of layers of which nothing is here, for which nothing can be launched."""
    of_layers = torch.zeros(2, table.layers, device=table.sizes.device)
    return of_layers[0], of_layers[1]
