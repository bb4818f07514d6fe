"""LARS on a GPU: one launch over all layers before their norms are known, and one after.

A table has, of each layer: ``w``; ``g``; ``v``, or ``w`` again without momentum; and whether this is its
first step.
"""

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
def _measure(
    columns,
    sizes,
    layer_of_chunk,
    offset_of_chunk,
    sums,
    lr,
    gradient_scale,
    weight_decay,
    momentum,
    entering,
    layers,
    chunks,
    dtype: tl.constexpr,
    denominator: tl.constexpr,
    nesterov: tl.constexpr,
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
    v_at = address(columns, 2, layer, layers)
    entering = tl.where(tl.load(columns + 3 * layers + layer) != 0, 1.0, entering)
    is_narrow = ((offset + chunk_size > size) | (((w_at | g_at | v_at) & 15) != 0)).to(tl.int32)
    w_squares = tl.zeros([block], tl.float64)
    squares = tl.zeros([block], tl.float64)
    for has_mask in tl.static_range(2):
        if is_narrow == has_mask:
            w_from = pointer_to(w_at, dtype, has_mask)
            g_from = pointer_to(g_at, dtype, has_mask)
            v_from = pointer_to(v_at, tl.float32, has_mask)
            for start in range(0, chunk_size, block):
                at = offset + start + tl.arange(0, block)
                mask = at < size
                w = weights(w_from + at, mask, has_mask, lr, weight_decay, decoupled_weight_decay)
                u = gradient(g_from + at, mask, has_mask, gradient_scale, has_scale, maximize)
                if denominator != "gradient" and not decoupled_weight_decay:
                    u = u + weight_decay * w
                if denominator == "momentum":
                    v = momentum * load(v_from + at, mask, has_mask) + entering * u
                    store(v_from + at, v, mask, has_mask)
                    if nesterov:
                        u = u + momentum * v
                    else:
                        u = v
                w_squares += square(w)
                squares += square(u)
    tl.store(sums + chunk, tl.sum(w_squares, axis=0))
    tl.store(sums + chunks + chunk, tl.sum(squares, axis=0))


@triton.jit
def _descend(
    columns,
    sizes,
    layer_of_chunk,
    offset_of_chunk,
    ratios,
    lr,
    gradient_scale,
    weight_decay,
    momentum,
    entering,
    layers,
    dtype: tl.constexpr,
    has_ratios: tl.constexpr,
    has_momentum: tl.constexpr,
    has_moved: tl.constexpr,
    nesterov: tl.constexpr,
    lr_in_momentum: tl.constexpr,
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
    v_at = address(columns, 2, layer, layers)
    entering = tl.where(tl.load(columns + 3 * layers + layer) != 0, 1.0, entering)
    rate = tl.load(lr)
    ratio = 1.0
    if has_ratios:
        ratio = tl.load(ratios + layer)
    is_narrow = ((offset + chunk_size > size) | (((w_at | g_at | v_at) & 15) != 0)).to(tl.int32)
    for has_mask in tl.static_range(2):
        if is_narrow == has_mask:
            w_from = pointer_to(w_at, dtype, has_mask)
            g_from = pointer_to(g_at, dtype, has_mask)
            v_from = pointer_to(v_at, tl.float32, has_mask)
            for start in range(0, chunk_size, block):
                at = offset + start + tl.arange(0, block)
                mask = at < size
                w = weights(w_from + at, mask, has_mask, lr, weight_decay, decoupled_weight_decay)
                if has_moved:  # v is that of this step, and the ratio comes after it
                    u = load(v_from + at, mask, has_mask)
                    if nesterov:
                        g = gradient(g_from + at, mask, has_mask, gradient_scale, has_scale, maximize)
                        if not decoupled_weight_decay:
                            g = g + weight_decay * w
                        u = g + momentum * u
                    u = ratio * u
                else:
                    u = gradient(g_from + at, mask, has_mask, gradient_scale, has_scale, maximize)
                    if not decoupled_weight_decay:
                        u = u + weight_decay * w
                    u = ratio * u
                    if lr_in_momentum:
                        u = rate * u
                    if has_momentum:
                        v = momentum * load(v_from + at, mask, has_mask) + entering * u
                        store(v_from + at, v, mask, has_mask)
                        if nesterov:
                            u = u + momentum * v
                        else:
                            u = v
                if not lr_in_momentum:
                    u = rate * u
                store(w_from + at, w - u, mask, has_mask)


def measure(
    table: LayerTable,
    dtype: torch.dtype,
    *,
    lr: Tensor,
    gradient_scale: Tensor | None,
    denominator: str,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> tuple[Tensor, Tensor]:
    """Return the norms of the weights, and of the denominator's ``g``, ``g + weight_decay * w`` or ``v``.

    With ``denominator="momentum"``, ``v`` is advanced.

    Args:
        table: The layers.
        dtype: Of weights and gradients.
        lr: 0-d, float32.
        gradient_scale: Factor on all gradients, 0-d, float32; None for 1.
        denominator: As in :class:`~lightning_lars.LARS`, and so are the others.
        momentum: Share of ``v`` that is kept.
        dampening: Share of the direction that does not enter ``v``.
        nesterov: Whether the direction looks ahead.
        weight_decay: Decay of the weights.
        decoupled_weight_decay: Whether it comes first.
        maximize: Whether to climb.

    Returns:
        Two tensors of shape ``(layers,)``, float32.
    """
    if not table.chunks:
        return no_norms(table)
    sums = torch.empty(2, table.chunks, dtype=torch.float64, device=table.device)
    with device_of(table):
        _measure[(table.chunks,)](
            table.columns,
            table.chunked.sizes,
            table.chunked.layer_of_chunk,
            table.chunked.offset_of_chunk,
            sums,
            lr,
            lr if gradient_scale is None else gradient_scale,
            weight_decay,
            momentum,
            1 - dampening,
            table.layers,
            table.chunks,
            dtype=DTYPES[dtype],
            denominator=denominator,
            nesterov=nesterov,
            decoupled_weight_decay=decoupled_weight_decay,
            has_scale=gradient_scale is not None,
            maximize=maximize,
            chunk_size=CHUNK,
            block=BLOCK,
        )
        return norms(sums, table)


def descend(
    table: LayerTable,
    dtype: torch.dtype,
    ratios: Tensor | None,
    *,
    lr: Tensor,
    gradient_scale: Tensor | None,
    has_moved: bool,
    momentum: float,
    dampening: float,
    nesterov: bool,
    lr_in_momentum: bool,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> None:
    """Move the weights, and ``v`` where it has not been.

    Args:
        table: The layers.
        dtype: Of weights and gradients.
        ratios: The trust ratios, shape ``(layers,)``, float32; None for 1.
        lr: 0-d, float32.
        gradient_scale: Factor on all gradients, 0-d, float32; None for 1.
        has_moved: Whether ``v`` has been advanced, which the ratio is then a factor on.
        momentum: As in :class:`~lightning_lars.LARS`, and so are the others.
        dampening: Share of the direction that does not enter ``v``.
        nesterov: Whether the direction looks ahead.
        lr_in_momentum: Whether ``lr`` is a factor on what enters ``v``.
        weight_decay: Decay of the weights.
        decoupled_weight_decay: Whether it comes first.
        maximize: Whether to climb.
    """
    if not table.chunks:
        return
    with device_of(table):
        _descend[(table.chunks,)](
            table.columns,
            table.chunked.sizes,
            table.chunked.layer_of_chunk,
            table.chunked.offset_of_chunk,
            lr if ratios is None else ratios,
            lr,
            lr if gradient_scale is None else gradient_scale,
            weight_decay,
            momentum,
            1 - dampening,
            table.layers,
            dtype=DTYPES[dtype],
            has_ratios=ratios is not None,
            has_momentum=momentum != 0,
            has_moved=has_moved,
            nesterov=nesterov,
            lr_in_momentum=lr_in_momentum,
            decoupled_weight_decay=decoupled_weight_decay,
            has_scale=gradient_scale is not None,
            maximize=maximize,
            chunk_size=CHUNK,
            block=BLOCK,
        )
