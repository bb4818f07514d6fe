"""One kernel for every algorithm, launched over all layers of a batch.

Each program handles one chunk of a layer and evaluates the equations of the algorithm, compiled from their
Python source. Only the last chunk of a layer needs a mask, so the loop is compiled twice, masked and
unmasked: unmasked loads and stores are four times as wide. Layers that are not aligned to 16 bytes take the
masked loop, without slowing other layers down.

Squares are summed in float64, because in float32 the square of a number below 1e-19 is 0.
"""

import triton
import triton.language as tl

from lightning_lars.optim.backends.triton_eight_bit import (
    BLOCK_SIZE,
    addresses_of,
    dequantize,
    pointers_to,
    quantize,
    rows_from,
)
from lightning_lars.optim.backends.triton_scalars import (
    ADDRESS,
    address_in,
    factor_of_layer,
    learning_rate,
    next_step,
)

BLOCK, WARPS = 1024, 8
"""The number of elements that a program loads at once, and its number of warps."""


@triton.jit
def pointer_to(address, dtype: tl.constexpr, has_mask: tl.constexpr):
    """Return a pointer to a tensor, which is aligned to 16 bytes in the unmasked loop."""
    pointer = address.to(tl.pointer_type(dtype))
    if not has_mask:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(pointer, mask, has_mask: tl.constexpr):
    """Load elements in float32."""
    if has_mask:
        x = tl.load(pointer, mask=mask, other=0.0)
    else:
        x = tl.load(pointer)
    return x.to(tl.float32)


@triton.jit
def store(pointer, x, mask, has_mask: tl.constexpr):
    """Store elements, cast to the pointer's element type."""
    x = x.to(pointer.dtype.element_ty)
    if has_mask:
        tl.store(pointer, x, mask=mask)
    else:
        tl.store(pointer, x)


@triton.jit
def square(x):
    """Return the squares in float64."""
    x = x.to(tl.float64)
    return x * x


@triton.jit(do_not_specialize_on_alignment=ADDRESS)
def walk(
    columns,
    sizes,
    layer_of_chunk,
    offset_of_chunk,
    direction_offsets,
    directions,
    sums,
    ratios,
    factors,
    kinds,
    lr,
    weight_decay,
    gradient_scale,
    layers,
    chunks,
    h,
    code_tables,
    tensor_lr: tl.constexpr,
    numbers: tl.constexpr,
    direction: tl.constexpr,
    denominator_vector: tl.constexpr,
    moments: tl.constexpr,
    absent: tl.constexpr,
    in_eight_bit: tl.constexpr,
    counts_steps: tl.constexpr,
    dtype: tl.constexpr,
    mode: tl.constexpr,
    decays: tl.constexpr,
    has_scale: tl.constexpr,
    chunk_size: tl.constexpr,
    block: tl.constexpr,
):
    """Run one pass over the layers, which ``mode`` selects.

    ``"measure"`` sums the squares of the weights and of the vector ``d``. This is what ``denominator_vector``
    returns, or, where that is None, the direction; the pass then also stores the direction and updates the
    moments. ``"move"`` updates weights and moments. ``"apply"`` updates the weights along the stored
    direction.

    With moments in 8 bits, computing the direction twice moves fewer bytes than storing it, so ``"measure"``
    stores nothing but the sums.
    """
    chunk = tl.program_id(0)
    if mode != "measure":
        # Backwards, because the end of what the pass before has read is still in the cache.
        chunk = chunks - 1 - chunk
    layer = tl.load(layer_of_chunk + chunk)
    offset = tl.multiple_of(tl.load(offset_of_chunk + chunk), 16)
    size = tl.load(sizes + layer)
    w_at = address_in(columns, 0, layer, layers)
    g_at = address_in(columns, 1, layer, layers)
    every_at = w_at | g_at
    moments_at = ()
    for i in tl.static_range(moments):
        if in_eight_bit:
            moment_at = addresses_of(columns, 2 + 3 * i, layer, layers)
            every_at = every_at | moment_at[0]
        else:
            moment_at = address_in(columns, 2 + i, layer, layers)
            every_at = every_at | moment_at
        moments_at = moments_at + (moment_at,)
    stores_direction: tl.constexpr = denominator_vector is None and not in_eight_bit
    d_from = directions
    if mode == "apply" or stores_direction:
        d_from = directions + tl.multiple_of(tl.load(direction_offsets + layer), 16)
    rate_of_all = learning_rate(lr, tensor_lr)
    t = 0.0
    if counts_steps:
        t = next_step(columns, 2 + (3 * moments if in_eight_bit else moments), layer, layers)
    ratio = 1.0
    if ratios is not None:
        ratio = tl.load(ratios + layer)
    rate = factor_of_layer(factors[0], kinds[0], rate_of_all, ratio, t)
    factors_of_layer = ()
    for i in tl.static_range(numbers):
        factors_of_layer = factors_of_layer + (
            factor_of_layer(factors[i + 1], kinds[i + 1], rate_of_all, ratio, t),
        )
    is_narrow = ((offset + chunk_size > size) | ((every_at & 15) != 0)).to(tl.int32)
    rows: tl.constexpr = block // BLOCK_SIZE
    shape: tl.constexpr = (rows, BLOCK_SIZE) if in_eight_bit else (block,)
    w_squares = tl.zeros(shape, tl.float64)
    d_squares = tl.zeros(shape, tl.float64)
    for has_mask in tl.static_range(2):
        if is_narrow == has_mask:
            w_from = pointer_to(w_at, dtype, has_mask)
            g_from = pointer_to(g_at, dtype, has_mask)
            moments_from = ()
            for i in tl.static_range(moments):
                if in_eight_bit:
                    moments_from = moments_from + (pointers_to(moments_at[i], has_mask),)
                else:
                    moments_from = moments_from + (pointer_to(moments_at[i], tl.float32, has_mask),)
            for start in range(0, chunk_size, block):
                if in_eight_bit:
                    at = rows_from(offset + start, rows)
                else:
                    at = offset + start + tl.arange(0, block)
                mask = at < size
                w = load(w_from + at, mask, has_mask)
                if h.decoupled_weight_decay:
                    w = w * (1 - rate_of_all * weight_decay)
                if mode == "apply":
                    d = load(d_from + at, mask, has_mask)
                else:
                    g = load(g_from + at, mask, has_mask)
                    if h.maximize:
                        g = -g
                    if has_scale:
                        g = g * tl.load(gradient_scale)
                    decayed_w = 0.0
                    if decays:
                        decayed_w = w
                    if mode == "measure" and denominator_vector is not None:
                        d = denominator_vector(decayed_w, g, h)
                    else:
                        before = ()
                        for i in tl.static_range(moments):
                            if in_eight_bit:
                                before = before + (
                                    dequantize(moments_from[i], offset + start, size, has_mask, rows),
                                )
                            else:
                                before = before + (load(moments_from[i] + at, mask, has_mask),)
                        for i in tl.static_range(absent):
                            before = before + (0.0,)
                        step = direction(decayed_w, g, *before, *factors_of_layer, h)
                        d = step[0]
                        for i in tl.static_range(moments):
                            if not in_eight_bit:
                                store(moments_from[i] + at, step[i + 1], mask, has_mask)
                            elif mode == "move":
                                table = code_tables[i]
                                first, after = offset + start, step[i + 1]
                                quantize(moments_from[i], table, first, size, after, has_mask, rows)
                        if mode == "measure" and stores_direction:
                            store(d_from + at, d, mask, has_mask)
                if mode == "measure":
                    if has_mask:
                        d = tl.where(mask, d, 0.0)  # 0 / 0 beyond the end of the layer, with eps=0
                    w_squares += square(w)
                    d_squares += square(d)
                else:
                    store(w_from + at, w - rate * d, mask, has_mask)
    if mode == "measure":
        tl.store(sums + chunk, tl.sum(w_squares))
        tl.store(sums + chunks + chunk, tl.sum(d_squares))
