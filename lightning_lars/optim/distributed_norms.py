"""Norms that need an all-reduce where layers are sharded: of whole layers, and of all gradients."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_lars.optim.backends.eager import Eager
from lightning_lars.optim.batches import Batch, Shards
from lightning_lars.sharding.norms import layer_norms, start_whole_norms, whole_norms
from lightning_lars.sharding.shards import Shard, local

Norms = tuple[Tensor, Tensor]
"""The norms ``|w|`` and ``|d|``, each of shape ``(layers,)``."""


def gradient_scale(
    backends: Sequence[Eager], max_grad_norm: float | None, params: Iterable[Tensor], shards: Shards
) -> Tensor | None:
    """Return ``min(1, max_grad_norm / |all gradients|)``, or None if gradients are not clipped.

    Gradients that are not finite are left out, so that one layer does not spoil all others.
    """
    if max_grad_norm is None:
        return None
    norms = [backend.gradient_norms() for backend in backends if not backend.batch.is_sharded]
    sharded = _sharded(params, shards)
    if sharded:
        here: dict[Tensor, Tensor] = {}
        for backend in backends:
            if backend.batch.is_sharded:
                here.update(zip(backend.batch.params, backend.gradient_norms().unbind(), strict=True))
        norms.append(torch.stack(whole_norms([here.get(p) for p in sharded], list(sharded.values()))))
    if not norms:
        return None
    norm_of_each = torch.cat([norm.to(norms[0], non_blocking=True) for norm in norms])
    norm: Tensor = torch.linalg.vector_norm(norm_of_each.where(norm_of_each.isfinite(), 0))
    return (max_grad_norm / norm).clamp(max=1)


def start_exchange(
    waiting: Iterable[tuple[Batch, Norms]], params: Iterable[Tensor], shards: Shards
) -> Callable[[], dict[Tensor, Norms]]:
    """Begin to compute the norms of whole layers, for all that are sharded.

    All ranks must call this, because a layer without a gradient on one rank may have one on another.

    Args:
        waiting: Batches of sharded layers with a gradient, and the norms of their local shards.
        params: All parameters that may be sharded, in the same order on all ranks.
        shards: How each parameter is sharded.

    Returns:
        A function, to be called once, that waits for the norms and returns them.
    """
    sharded = _sharded(params, shards)
    if not sharded:
        return dict
    weights: dict[Tensor, Tensor] = {}
    directions: dict[Tensor, Tensor] = {}
    for batch, (w_norms, d_norms) in waiting:
        weights.update(zip(batch.params, w_norms.unbind(), strict=True))
        directions.update(zip(batch.params, d_norms.unbind(), strict=True))
    for p in sharded:
        if p not in weights:
            # The shard is part of the layer, though it has no gradient and is not updated.
            weights[p] = layer_norms([local(p)])[0]
    here = [weights.get(p) for p in sharded] + [directions.get(p) for p in sharded]
    finish = start_whole_norms(here, [*sharded.values(), *sharded.values()])

    def norms_of_layers() -> dict[Tensor, Norms]:
        norms = finish()
        pairs = zip(norms[: len(sharded)], norms[len(sharded) :], strict=True)
        return dict(zip(sharded, pairs, strict=True))

    return norms_of_layers


def stack_norms(params: Sequence[Tensor], norms: dict[Tensor, Norms], device: torch.device) -> Norms:
    """Stack the norms of layers on a device."""
    weight_norms, direction_norms = zip(*(norms[p] for p in params), strict=True)
    return torch.stack(weight_norms).to(device), torch.stack(direction_norms).to(device)


def is_updated_elsewhere(p: Tensor, shards: Shards) -> bool:
    """Return whether a layer has a gradient, but no shard on this rank (FSDP1)."""
    shard = shards[p]
    return p.grad is None and shard is not None and shard.unit is not None and shard.unit.grad is not None


def _sharded(params: Iterable[Tensor], shards: Shards) -> dict[Tensor, Shard]:
    sharded: dict[Tensor, Shard] = {}
    if not any(shards.values()):
        return sharded
    for p in params:
        shard = shards[p]
        if shard is not None and shard.groups:
            sharded[p] = shard
    return sharded
