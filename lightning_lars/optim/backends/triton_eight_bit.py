"""State in 8 bits, as a kernel reads and writes it: block-wise quantized to the nearest number of a map.

Codes and scales are equal to the bit to those of :mod:`lightning_lars.optim.state.torchao`.
"""

import triton
import triton.language as tl

from lightning_lars.optim.backends.triton_scalars import address_in

SHARED = tl.constexpr(256)
"""Elements that share a scale."""

_SMALLEST = tl.constexpr(1e-12)


@triton.jit
def pointers_to(columns, column, layer, layers):
    """Return pointers to the codes of a layer, to the scales of its blocks, and to what codes stand for."""
    codes = tl.multiple_of(address_in(columns, column, layer, layers).to(tl.pointer_type(tl.uint8)), 16)
    scales = address_in(columns, column + 1, layer, layers).to(tl.pointer_type(tl.float32))
    shares = address_in(columns, column + 2, layer, layers).to(tl.pointer_type(tl.float32))
    return codes, scales, shares


@triton.jit
def dequantize(pointers, at, mask):
    """Return elements in float32."""
    code = tl.load(pointers[0] + at, mask=mask, other=0).to(tl.int32)
    scale = tl.load(pointers[1] + at // SHARED, mask=mask, other=0.0)
    return tl.load(pointers[2] + code, mask=mask, other=0.0) * scale


@triton.jit
def quantize(pointers, shares, at, mask, x, block: tl.constexpr):
    """Store elements of whole blocks, as codes of the nearest numbers among some shares of their largest.

    Args:
        pointers: To codes and scales.
        shares: Pointer to 256 numbers in ascending order.
        at: Where the elements are, shape ``(block,)``.
        mask: Which of them there are.
        x: The elements.
        block: How many.
    """
    rows: tl.constexpr = block // SHARED
    x = tl.reshape(x, (rows, SHARED))
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), _SMALLEST)
    not_a_number = tl.max((x != x).to(tl.int32), axis=1) != 0
    scale = tl.where(not_a_number, float("nan"), largest)
    code = tl.reshape(
        _nearest(tl.div_rn(x, tl.broadcast_to(scale[:, None], (rows, SHARED))), shares), (block,)
    )
    tl.store(pointers[0] + at, code.to(tl.uint8), mask=mask)
    first = tl.min(tl.reshape(at, (rows, SHARED)), axis=1)
    exists = tl.max(tl.reshape(mask.to(tl.int32), (rows, SHARED)), axis=1) != 0
    tl.store(pointers[1] + first // SHARED, scale, mask=exists)


@triton.jit
def _nearest(x, shares):
    """Return the number of the share that is nearest, of two the larger."""
    below = tl.zeros_like(x).to(tl.int32)
    for bit in tl.static_range(8):
        next_one = below + (128 >> bit)
        below = tl.where(x >= tl.load(shares + next_one), next_one, below)
    above = tl.minimum(below + 1, 255)
    share = tl.load(shares + below)
    return tl.where(x - share >= (tl.load(shares + above) - share) * 0.5, above, below)
