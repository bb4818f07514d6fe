"""Block-wise quantization of 8-bit state in Triton.

Codes and scales equal torchao's (:mod:`lightning_lars.optim.state.torchao`) bit for bit.
"""

import triton
import triton.language as tl

from lightning_lars.optim.backends.triton_scalars import address_in

BLOCK_SIZE = tl.constexpr(256)
"""The number of elements that share a scale."""

_MIN_SCALE = tl.constexpr(1e-12)


@triton.jit
def pointers_to(columns, column, layer, layers):
    """Return pointers to the codes, the scales and the quantization map of a moment of a layer."""
    codes = tl.multiple_of(address_in(columns, column, layer, layers).to(tl.pointer_type(tl.uint8)), 16)
    scales = address_in(columns, column + 1, layer, layers).to(tl.pointer_type(tl.float32))
    qmap = address_in(columns, column + 2, layer, layers).to(tl.pointer_type(tl.float32))
    return codes, scales, qmap


@triton.jit
def dequantize(pointers, at, mask):
    """Load elements of a moment, in float32.

    Args:
        pointers: Pointers to codes, scales and quantization map.
        at: Offsets of the elements in the layer.
        mask: Which of them exist.
    """
    code = tl.load(pointers[0] + at, mask=mask, other=0).to(tl.int32)
    scale = tl.load(pointers[1] + at // BLOCK_SIZE, mask=mask, other=0.0)
    return tl.load(pointers[2] + code, mask=mask, other=0.0) * scale


@triton.jit
def quantize(pointers, qmap, at, mask, x, block: tl.constexpr):
    """Store elements of a moment: the absolute maximum of each block as its scale, and the nearest codes.

    Args:
        pointers: Pointers to codes and scales.
        qmap: Pointer to the quantization map, 256 values in ascending order.
        at: Offsets of the elements in the layer, shape ``(block,)``, from a multiple of :data:`BLOCK_SIZE`.
        mask: Which of them exist.
        x: The elements.
        block: The number of elements, a multiple of :data:`BLOCK_SIZE`.
    """
    rows: tl.constexpr = block // BLOCK_SIZE
    x = tl.reshape(x, (rows, BLOCK_SIZE))
    absmax = tl.maximum(tl.max(tl.abs(x), axis=1), _MIN_SCALE)
    has_nan = tl.max((x != x).to(tl.int32), axis=1) != 0
    scale = tl.where(has_nan, float("nan"), absmax)
    code = tl.reshape(
        _nearest(tl.div_rn(x, tl.broadcast_to(scale[:, None], (rows, BLOCK_SIZE))), qmap), (block,)
    )
    tl.store(pointers[0] + at, code.to(tl.uint8), mask=mask)
    first = tl.min(tl.reshape(at, (rows, BLOCK_SIZE)), axis=1)
    exists = tl.max(tl.reshape(mask.to(tl.int32), (rows, BLOCK_SIZE)), axis=1) != 0
    tl.store(pointers[1] + first // BLOCK_SIZE, scale, mask=exists)


@triton.jit
def _nearest(x, qmap):
    """Return the code of the nearest value, the higher one of two that are equally near."""
    below = tl.zeros_like(x).to(tl.int32)
    for bit in tl.static_range(8):
        next_one = below + (128 >> bit)
        below = tl.where(x >= tl.load(qmap + next_one), next_one, below)
    above = tl.minimum(below + 1, 255)
    value = tl.load(qmap + below)
    return tl.where(x - value >= (tl.load(qmap + above) - value) * 0.5, above, below)
