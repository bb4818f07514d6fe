"""The norms of layers, added up from their chunks, and the trust ratios, by the equation of the algorithm."""

import triton
import triton.language as tl

from lightning_lars.optim.backends.triton_scalars import ADDRESS, count_step, learning_rate


@triton.jit
def trust_ratio(weight_norm, denominator, trust_coefficient=1.0, eps=0.0):
    """Return the trust ratio of a layer, 1 where there is no scale to adapt to."""
    ratio = tl.div_rn(trust_coefficient * weight_norm, denominator + eps)
    return tl.where((weight_norm == 0) | (denominator == 0), 1.0, ratio)


@triton.jit
def clip(x, low, high):
    """Return a number within bounds; NaN stays NaN."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, low), high), x)


@triton.jit
def over_lr(ratio, lr):
    """Return ``ratio / lr``, infinite at ``lr=0``."""
    return tl.div_rn(ratio, lr)


@triton.jit
def bounds(h):
    """Return least and most of the trust ratio."""
    return h.low, h.high


@triton.jit
def trust_ratios(weight_norm, denominator, unclipped, ratio):
    """Return what is remembered of a layer, in this order."""
    return weight_norm, denominator, unclipped, ratio


@triton.jit
def _norm(sums, begin, end, rounds: tl.constexpr, chunks_at_once: tl.constexpr):
    """Return the root of some sums of squares, in float32."""
    total = tl.zeros([chunks_at_once], tl.float64)
    for number in range(0, rounds):
        chunk = begin + number * chunks_at_once + tl.arange(0, chunks_at_once)
        total += tl.load(sums + chunk, mask=chunk < end, other=0.0)
    return tl.sqrt(tl.sum(total, axis=0)).to(tl.float32)


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
    rounds: tl.constexpr,
    chunks_at_once: tl.constexpr,
):
    """Add up the squares of the chunks of each layer, and compute its trust ratio where layers are whole.

    Fills a row of ``of_layers`` with the norms of the weights and one with those of what they are measured
    against, or four with :class:`~lightning_lars.optim.trust_ratio.TrustRatios`. Where layers count their
    steps, which is in column ``steps_in``, counts one: what measured them has read the number.
    """
    layer = tl.program_id(0)
    begin = tl.load(first_chunk + layer)
    end = tl.load(first_chunk + layer + 1)
    w_norm = _norm(sums, begin, end, rounds, chunks_at_once)
    d_norm = _norm(sums + chunks, begin, end, rounds, chunks_at_once)
    if ratio is None:
        tl.store(of_layers + layer, w_norm)
        tl.store(of_layers + layers + layer, d_norm)
    else:
        ratios = ratio(w_norm, d_norm, learning_rate(lr, tensor_lr), h)
        for i in tl.static_range(4):
            tl.store(of_layers + i * layers + layer, ratios[i])
    if steps_in is not None:
        count_step(columns, steps_in, layer, layers)
