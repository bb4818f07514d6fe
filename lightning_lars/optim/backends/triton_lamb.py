"""LAMB on a GPU: one launch over all layers before their norms are known, and one after.

A table has, of each layer, ``w``, ``g``, ``m``, ``v``, and the number ``t`` of the step. The direction ``u``
is not kept between the two: to compute it again moves less memory.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lars.optim.backends.triton_layers import (
    BLOCK,
    DTYPES,
    address,
    device_of,
    gradient,
    load,
    no_norms,
    norms,
    pointer_to,
    square,
    store,
    weights,
)
from lightning_lars.optim.backends.triton_table import CHUNK, LayerTable


@triton.jit
def _one_minus_exp(x):
    """Return ``1 - exp(x)`` for ``x <= 0``, near 0 by its series, as the difference has no digits there."""
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
    return tl.where(x > -0.3, -x * series, 1 - tl.exp(x))


@triton.jit
def _lamb(
    columns,
    sizes,
    layer_of_chunk,
    offset_of_chunk,
    sums,
    ratios,
    lr,
    gradient_scale,
    beta1,
    beta2,
    log_beta1,
    log_beta2,
    entering_m,
    entering_v,
    eps,
    weight_decay,
    layers,
    chunks,
    dtype: tl.constexpr,
    advances: tl.constexpr,
    measures: tl.constexpr,
    has_ratios: tl.constexpr,
    bias_correction: tl.constexpr,
    decoupled_weight_decay: tl.constexpr,
    has_scale: tl.constexpr,
    maximize: tl.constexpr,
    chunk_size: tl.constexpr,
    block: tl.constexpr,
):
    chunk = tl.program_id(0)
    layer = tl.load(layer_of_chunk + chunk)
    offset = tl.multiple_of(tl.load(offset_of_chunk + chunk), 16)
    size = tl.load(sizes + layer)
    w_at = address(columns, 0, layer, layers)
    g_at = address(columns, 1, layer, layers)
    m_at = address(columns, 2, layer, layers)
    v_at = address(columns, 3, layer, layers)
    correction1 = 1.0
    correction2 = 1.0
    if bias_correction:
        t = tl.load(pointer_to(address(columns, 4, layer, layers), tl.float32, True))
        correction1 = _one_minus_exp(t * log_beta1)
        correction2 = tl.sqrt(_one_minus_exp(t * log_beta2))
    rate = tl.load(lr)
    if has_ratios:
        rate = rate * tl.load(ratios + layer)
    is_narrow = ((offset + chunk_size > size) | (((w_at | g_at | m_at | v_at) & 15) != 0)).to(tl.int32)
    w_squares = tl.zeros([block], tl.float64)
    squares = tl.zeros([block], tl.float64)
    for has_mask in tl.static_range(2):
        if is_narrow == has_mask:
            w_from = pointer_to(w_at, dtype, has_mask)
            g_from = pointer_to(g_at, dtype, has_mask)
            m_from = pointer_to(m_at, tl.float32, has_mask)
            v_from = pointer_to(v_at, tl.float32, has_mask)
            for start in range(0, chunk_size, block):
                at = offset + start + tl.arange(0, block)
                mask = at < size
                w = weights(w_from + at, mask, has_mask, lr, weight_decay, decoupled_weight_decay)
                m = load(m_from + at, mask, has_mask)
                v = load(v_from + at, mask, has_mask)
                if advances:
                    g = gradient(g_from + at, mask, has_mask, gradient_scale, has_scale, maximize)
                    m = beta1 * m + entering_m * g
                    v = beta2 * v + entering_v * g * g
                    store(m_from + at, m, mask, has_mask)
                    store(v_from + at, v, mask, has_mask)
                u = m / (tl.sqrt(v) / correction2 + eps) / correction1
                if not decoupled_weight_decay:
                    u = u + weight_decay * w
                if measures:
                    if has_mask:
                        u = tl.where(mask, u, 0.0)  # 0 / 0, where eps is 0
                    w_squares += square(w)
                    squares += square(u)
                else:
                    store(w_from + at, w - rate * u, mask, has_mask)
    if measures:
        tl.store(sums + chunk, tl.sum(w_squares, axis=0))
        tl.store(sums + chunks + chunk, tl.sum(squares, axis=0))


def lamb(
    table: LayerTable,
    dtype: torch.dtype,
    *,
    advances: bool,
    measures: bool,
    ratios: Tensor | None,
    lr: Tensor,
    gradient_scale: Tensor | None,
    betas: tuple[float, float],
    eps: float,
    bias_correction: bool,
    grad_averaging: bool,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> tuple[Tensor, Tensor] | None:
    """Advance ``m`` and ``v``, return the norms of ``w`` and ``u``, or move the weights.

    Args:
        table: The layers.
        dtype: Of weights and gradients.
        advances: Whether to advance the moments.
        measures: Whether to return the norms, rather than to move the weights.
        ratios: The trust ratios, shape ``(layers,)``, float32; None for 1.
        lr: 0-d, float32.
        gradient_scale: Factor on all gradients, 0-d, float32; None for 1.
        betas: As in :class:`~lightning_lars.LAMB`, and so are the others.
        eps: Added to the denominator.
        bias_correction: Whether ``m`` and ``v`` are corrected for their start at 0.
        grad_averaging: Whether ``g`` enters ``m`` times ``1 - beta1``.
        weight_decay: Decay of the weights.
        decoupled_weight_decay: Whether it comes first.
        maximize: Whether to climb.

    Returns:
        Where ``measures``, two tensors of shape ``(layers,)``, float32.
    """
    beta1, beta2 = betas
    if not table.chunks:
        return no_norms(table) if measures else None
    sums = torch.empty(2, table.chunks if measures else 0, dtype=torch.float64, device=table.device)
    with device_of(table):
        _lamb[(table.chunks,)](
            table.columns,
            table.chunked.sizes,
            table.chunked.layer_of_chunk,
            table.chunked.offset_of_chunk,
            sums if measures else lr,
            lr if ratios is None else ratios,
            lr,
            lr if gradient_scale is None else gradient_scale,
            beta1,
            beta2,
            _log(beta1),
            _log(beta2),
            1 - beta1 if grad_averaging else 1.0,
            1 - beta2,
            eps,
            weight_decay,
            table.layers,
            table.chunks,
            dtype=DTYPES[dtype],
            advances=advances,
            measures=measures,
            has_ratios=ratios is not None,
            bias_correction=bias_correction,
            decoupled_weight_decay=decoupled_weight_decay,
            has_scale=gradient_scale is not None,
            maximize=maximize,
            chunk_size=CHUNK,
            block=BLOCK,
        )
        return norms(sums, table) if measures else None


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -100.0  # whose exp is nothing beside 1
