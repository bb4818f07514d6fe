"""The norm of the gradient of each layer, for ``max_grad_norm``, in two launches over all layers."""

import triton
import triton.language as tl

from lightning_lars.optim.backends.triton_ratio import norm_of_layer
from lightning_lars.optim.backends.triton_scalars import address_in
from lightning_lars.optim.backends.triton_walk import load, pointer_to, square


@triton.jit
def gradient_squares(
    columns,
    sizes,
    layer_of_chunk,
    offset_of_chunk,
    sums,
    layers,
    dtype: tl.constexpr,
    chunk_size: tl.constexpr,
    block: tl.constexpr,
):
    """Store the sum of the squares of each chunk of the gradients, which are column 1 of the table."""
    chunk = tl.program_id(0)
    layer = tl.load(layer_of_chunk + chunk)
    offset = tl.multiple_of(tl.load(offset_of_chunk + chunk), 16)
    size = tl.load(sizes + layer)
    address = address_in(columns, 1, layer, layers)
    is_narrow = ((offset + chunk_size > size) | ((address & 15) != 0)).to(tl.int32)
    squares = tl.zeros([block], tl.float64)
    for has_mask in tl.static_range(2):
        if is_narrow == has_mask:
            pointer = pointer_to(address, dtype, has_mask)
            for start in range(0, chunk_size, block):
                at = offset + start + tl.arange(0, block)
                squares += square(load(pointer + at, at < size, has_mask))
    tl.store(sums + chunk, tl.sum(squares, axis=0))


@triton.jit
def gradient_norms(first_chunk, sums, norms, rounds, chunks_at_once: tl.constexpr):
    """Store the norm of each layer in float64, from the sums of its chunks."""
    layer = tl.program_id(0)
    begin = tl.load(first_chunk + layer)
    end = tl.load(first_chunk + layer + 1)
    tl.store(norms + layer, norm_of_layer(sums, begin, end, rounds, chunks_at_once))
