"""The kernel that reduces the sums of chunks to norms, and computes the trust ratios from them."""

import triton
import triton.language as tl

from lightning_lars.optim.backends.triton_scalars import ADDRESS, count_step, learning_rate


@triton.jit
def trust_ratio(weight_norm, denominator, trust_coefficient=1.0, eps=0.0):
    """Return the trust ratio of a layer, 1 where a norm is 0."""
    ratio = tl.div_rn(trust_coefficient * weight_norm, denominator + eps)
    return tl.where((weight_norm == 0) | (denominator == 0), 1.0, ratio)


@triton.jit
def clip(x, low, high):
    """Clip a number to bounds; NaN stays NaN."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, low), high), x)


@triton.jit
def over_lr(ratio, lr):
    """Return ``ratio / lr``, infinite at ``lr=0``."""
    return tl.div_rn(ratio, lr)


@triton.jit
def clipped(ratio, h):
    """Return the trust ratio within its bounds."""
    if h.trust_clip is not None:
        ratio = clip(ratio, h.low, h.high)
    return ratio


@triton.jit
def trust_ratios(weight_norm, denominator, unclipped, ratio):
    """Return the fields of ``TrustRatios`` as a tuple."""
    return weight_norm, denominator, unclipped, ratio


@triton.jit
def norm_of_layer(sums, begin, end, rounds, chunks_at_once: tl.constexpr):
    """Return the square root of the total of some sums of squares, in float64."""
    total = tl.zeros([chunks_at_once], tl.float64)
    for number in range(0, rounds):
        chunk = begin + number * chunks_at_once + tl.arange(0, chunks_at_once)
        total += tl.load(sums + chunk, mask=chunk < end, other=0.0)
    return tl.sqrt(tl.sum(total, axis=0))


@triton.jit(do_not_specialize_on_alignment=ADDRESS)
def adapt(
    columns,
    first_chunk,
    sums,
    of_layers,
    lr,
    layers,
    chunks,
    h,
    tensor_lr: tl.constexpr,
    ratio: tl.constexpr,
    steps_in: tl.constexpr,
    rounds,
    chunks_at_once: tl.constexpr,
):
    """Reduce the sums of the chunks to the norms of each layer, and compute its trust ratio.

    Without ``ratio``, it stores ``|w|`` and ``|d|`` in the two rows of ``of_layers``; with it, the four
    fields of :class:`~lightning_lars.optim.trust_ratio.TrustRatios`. If ``steps_in`` is given, it also
    increments the step of each layer, whose address is in that column: the previous launch has read it.
    """
    layer = tl.program_id(0)
    begin = tl.load(first_chunk + layer)
    end = tl.load(first_chunk + layer + 1)
    w_norm = norm_of_layer(sums, begin, end, rounds, chunks_at_once).to(tl.float32)
    d_norm = norm_of_layer(sums + chunks, begin, end, rounds, chunks_at_once).to(tl.float32)
    if ratio is None:
        tl.store(of_layers + layer, w_norm)
        tl.store(of_layers + layers + layer, d_norm)
    else:
        ratios = ratio(w_norm, d_norm, learning_rate(lr, tensor_lr), h)
        for i in tl.static_range(4):
            tl.store(of_layers + i * layers + layer, ratios[i])
    if steps_in is not None:
        count_step(columns, steps_in, layer, layers)
