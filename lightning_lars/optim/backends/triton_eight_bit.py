"""Block-wise quantization of 8-bit state in Triton.

Codes and scales equal torchao's (:mod:`lightning_lars.optim.state.torchao`) bit for bit. Elements come in
rows of :data:`BLOCK_SIZE`, the block that shares a scale.
"""

import triton
import triton.language as tl

from lightning_lars.optim.backends.triton_scalars import address_in

BLOCK_SIZE = tl.constexpr(256)
"""The number of elements that share a scale."""

_MIN_SCALE = tl.constexpr(1e-12)


@triton.jit
def rows_from(start, rows: tl.constexpr):
    """Return the offsets of some rows of elements, shape ``(rows, BLOCK_SIZE)``."""
    return start + tl.arange(0, rows)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]


@triton.jit
def addresses_of(columns, column, layer, layers):
    """Return the addresses of the codes, the scales and the quantization map of a moment of a layer."""
    return (
        address_in(columns, column, layer, layers),
        address_in(columns, column + 1, layer, layers),
        address_in(columns, column + 2, layer, layers),
    )


@triton.jit
def pointers_to(addresses, has_mask: tl.constexpr):
    """Return pointers to codes, scales and quantization map; codes are aligned in the unmasked loop."""
    codes = addresses[0].to(tl.pointer_type(tl.uint8))
    if not has_mask:
        codes = tl.multiple_of(codes, 16)
    return codes, addresses[1].to(tl.pointer_type(tl.float32)), addresses[2].to(tl.pointer_type(tl.float32))


@triton.jit
def dequantize(pointers, start, size, has_mask: tl.constexpr, rows: tl.constexpr):
    """Load elements of a moment, in float32.

    Args:
        pointers: Pointers to codes, scales and quantization map.
        start: The offset of the first element in the layer, a multiple of :data:`BLOCK_SIZE`.
        size: The number of elements of the layer, a multiple of :data:`BLOCK_SIZE`.
        has_mask: Whether some of the rows may not exist.
        rows: The number of rows to load.
    """
    row = start // BLOCK_SIZE + tl.arange(0, rows)
    at = rows_from(start, rows)
    if has_mask:
        code = tl.load(pointers[0] + at, mask=at < size, other=0).to(tl.int32)
        scale = tl.load(pointers[1] + row, mask=row * BLOCK_SIZE < size, other=0.0)
    else:
        code = tl.load(pointers[0] + at).to(tl.int32)
        scale = tl.load(pointers[1] + row)
    return tl.load(pointers[2] + code) * scale[:, None]


@triton.jit
def quantize(pointers, table, start, size, x, has_mask: tl.constexpr, rows: tl.constexpr):
    """Store elements of a moment: the absolute maximum of each row as its scale, and the nearest codes.

    Args:
        pointers: Pointers to codes, scales and quantization map.
        table: The :class:`~lightning_lars.optim.state.code_table.CodeTable` of the quantization map.
        start: The offset of the first element in the layer, a multiple of :data:`BLOCK_SIZE`.
        size: The number of elements of the layer, a multiple of :data:`BLOCK_SIZE`.
        x: The elements, shape ``(rows, BLOCK_SIZE)``.
        has_mask: Whether some of the rows may not exist.
        rows: The number of rows.
    """
    absmax = tl.maximum(tl.max(tl.abs(x), axis=1), _MIN_SCALE)
    has_nan = tl.max((x != x).to(tl.int32), axis=1) != 0
    scale = tl.where(has_nan, float("nan"), absmax)
    code = _nearest(tl.div_rn(x, tl.broadcast_to(scale[:, None], (rows, BLOCK_SIZE))), table).to(tl.uint8)
    row = start // BLOCK_SIZE + tl.arange(0, rows)
    at = rows_from(start, rows)
    if has_mask:
        tl.store(pointers[0] + at, code, mask=at < size)
        tl.store(pointers[1] + row, scale, mask=row * BLOCK_SIZE < size)
    else:
        tl.store(pointers[0] + at, code)
        tl.store(pointers[1] + row, scale)


@triton.jit
def _nearest(x, table):
    """Return the code of the nearest value, the higher one of two that are equally near; 0 for NaN."""
    is_number = x == x
    x = tl.where(is_number, x, 0.0)
    cell = tl.maximum(((x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> table.shift) - table.first, 0)
    code = tl.load(table.lowest + tl.where(x < 0, cell + table.cells, cell)).to(tl.int32)
    code += (x >= tl.load(table.thresholds + code + 1)).to(tl.int32)
    return tl.where(is_number, code, 0)
