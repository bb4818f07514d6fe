"""The norm of the gradient of each layer, for ``max_grad_norm``, in two launches over all layers."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lars.optim.backends.triton_launch import Launches
from lightning_lars.optim.backends.triton_ratio import norm_of_layer
from lightning_lars.optim.backends.triton_scalars import address_in
from lightning_lars.optim.backends.triton_table import LayerTable
from lightning_lars.optim.backends.triton_walk import load, pointer_to, square


def norms_of_gradients(
    launches: Launches,
    table: LayerTable,
    dtype: Any,
    chunk_size: int,
    block: int,
    warps: int,
    chunks_at_once: int,
) -> Tensor:
    """Return the norm of the gradient of each layer in a table, shape ``(layers,)``, in float64.

    Args:
        launches: Launches the kernels.
        table: Weights and gradients of the layers, on the current device.
        dtype: Triton's dtype of the gradients.
        chunk_size: Elements of a chunk of the table.
        block: Elements that a program processes at once.
        warps: Warps of a program.
        chunks_at_once: Sums of chunks that a program adds up at once.
    """
    chunked = table.chunked
    sums = torch.empty(max(table.chunks, 1), dtype=torch.float64, device=table.device)
    norms = torch.empty(table.layers, dtype=torch.float64, device=table.device)
    if table.chunks:
        launches(
            gradient_squares,
            "gradient_squares",
            table.chunks,
            table.columns,
            chunked.sizes,
            chunked.layer_of_chunk,
            chunked.offset_of_chunk,
            sums,
            table.layers,
            dtype,
            chunk_size,
            block,
            warps=warps,
        )
    launches(
        gradient_norms,
        "gradient_norms",
        table.layers,
        chunked.first_chunk,
        sums,
        norms,
        triton.cdiv(chunked.most_chunks, chunks_at_once),
        chunks_at_once,
    )
    return norms


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
