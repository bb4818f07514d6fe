"""What the kernels for LARS and for LAMB have in common: reading layers through their table, and norms.

A program works on one chunk of a layer. Only a chunk that the end of its layer cuts needs a mask. A kernel
has its code twice, with a mask and without, as loads and stores without one are four times as wide. A layer
that does not begin at a multiple of 16 bytes takes the code with a mask, and no other layer does for it.

Squares are added up in float64: in float32 those of numbers below 1e-19 vanish.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lars.optim.backends.triton_table import LayerTable

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCK = 1024
_CHUNKS_AT_ONCE = 256


@triton.jit
def address(columns, column, layer, layers):
    """Return where the tensor of a layer begins."""
    return tl.load(columns + column * layers + layer)


@triton.jit
def pointer_to(address, dtype: tl.constexpr, has_mask: tl.constexpr):
    """Return a pointer to a tensor; without a mask, to one that begins at a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(dtype))
    if not has_mask:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def square(x):
    """Return the squares in float64."""
    x = x.to(tl.float64)
    return x * x


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
    total = tl.zeros([chunks_at_once], tl.float64)
    begin = tl.load(first_chunk + layer)
    for number in range(0, rounds):
        chunk = begin + number * chunks_at_once + tl.arange(0, chunks_at_once)
        total += tl.load(sums + row * chunks + chunk, mask=chunk < end, other=0.0)
    tl.store(norms + row * layers + layer, tl.sqrt(tl.sum(total, axis=0)).to(tl.float32))


def device_of(table: LayerTable) -> AbstractContextManager[object]:
    """Make the device of the layers the current one, to which Triton launches."""
    device = table.device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def norms(sums: Tensor, table: LayerTable) -> tuple[Tensor, Tensor]:
    """Return the norms of weights and direction, in a launch on the current device.

    Args:
        sums: Of squares over each chunk, shape ``(2, chunks)``, float64.
        table: Which chunks a layer has.

    Returns:
        Two tensors of shape ``(layers,)``, float32.
    """
    of_layers = sums.new_empty(2, table.layers, dtype=torch.float32)
    _norms[(table.layers, 2)](
        sums,
        of_layers,
        table.chunked.first_chunk,
        table.layers,
        table.chunks,
        rounds=triton.cdiv(table.chunked.most_chunks, _CHUNKS_AT_ONCE),
        chunks_at_once=_CHUNKS_AT_ONCE,
    )
    return of_layers[0], of_layers[1]


def no_norms(table: LayerTable) -> tuple[Tensor, Tensor]:
    """Return the norms of layers of which nothing is here, for which nothing can be launched."""
    of_layers = torch.zeros(2, table.layers, dtype=torch.float32, device=table.device)
    return of_layers[0], of_layers[1]
