"""Layers sorted into batches that a back end updates together."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Hyperparameters
from lightning_lars.optim.backends.choice import triton_supports, uses_triton
from lightning_lars.sharding.shards import Shard, local, local_gradient

# The largest batch, in elements. The updates of a batch exist at the same time, beside float32 copies of its
# half-precision weights: four tensors of this size are 256 MiB of scratch.
# Smaller on the CPU, so that the tensors are still in the cache when the weights are updated.
_MAX_BATCH_ELEMENTS, _MAX_BATCH_ELEMENTS_ON_CPU = 2**24, 2**20

# A kernel keeps nothing but the directions: 256 MiB as well.
_MAX_BATCH_ELEMENTS_IN_KERNEL = 2**26

Shards = Mapping[Tensor, Shard | None]
"""How each parameter is sharded; None for a plain tensor."""


class Batch(NamedTuple):
    """Layers of one group with the same device and dtype: the local shards of their weights and gradients."""

    group: dict[str, Any]
    h: Hyperparameters
    params: list[Tensor]
    weights: list[Tensor]
    grads: list[Tensor]
    states: list[Any]
    """The state dict of each layer; None if it has none yet."""

    is_sharded: bool
    is_first: bool
    """Whether this is the first step of these layers."""

    adapts_direction: bool
    """Whether the direction is computed, and the moments updated, before the trust ratio."""

    in_eight_bit: bool = False
    """Whether a kernel reads and writes the moments in 8 bits."""


_BatchKey = tuple[torch.device, torch.dtype, bool, bool]


def sort_layers(
    group: dict[str, Any],
    h: Hyperparameters,
    adapts_direction: bool,
    states: Mapping[Any, Any],
    shards: Shards,
    is_first: Callable[[Tensor, Any], bool],
    name: Callable[[Tensor], str],
) -> Iterable[Batch]:
    """Sort the layers of a group that have a gradient into batches of bounded size.

    Args:
        group: The parameter group.
        h: Its hyperparameters.
        adapts_direction: Whether the direction of its layers is computed before their trust ratios.
        states: The state of the optimizer, by parameter.
        shards: How the layers are sharded; empty if none is.
        is_first: Returns whether the next step of a layer, given with its state, is its first.
        name: Returns the name of a parameter, for errors.

    Raises:
        RuntimeError: If a gradient is sparse, has another shape than its parameter, or is a plain tensor
            where its parameter is a DTensor.
    """
    batches: list[Batch] = []
    # The batch that takes more layers of a kind, and how many elements it still takes.
    open_batches: dict[_BatchKey, tuple[Batch, list[float]]] = {}
    dense = torch.strided
    for p in group["params"]:
        grad = p.grad
        if grad is None:
            continue
        if grad.layout is not dense:
            raise RuntimeError(
                f"gradients must be dense, got a sparse one for parameter {name(p)!r}: "
                "build its module with sparse=False or give it to SparseAdam"
            )
        w, is_sharded = p, False
        shard = shards[p] if shards else None
        if shard is not None:
            if hasattr(p, "device_mesh") and not hasattr(grad, "device_mesh"):
                raise RuntimeError(
                    f"the gradient of a DTensor must be a DTensor, got a plain tensor for parameter "
                    f"{name(p)!r}: distribute it with torch.distributed.tensor.distribute_tensor()"
                )
            w, grad, is_sharded = local(p), local_gradient(p), len(shard.groups) > 0
        if grad.shape != w.shape:
            raise RuntimeError(
                f"the gradient of parameter {name(p)!r} must have the parameter's shape, "
                f"{tuple(w.shape)}, got {tuple(grad.shape)}: set it to None where a parameter "
                "is given another shape"
            )
        state = states.get(p)
        key, elements = (w.device, w.dtype, is_sharded, is_first(p, state)), w.numel()
        batch, remaining = open_batches.get(key) or (None, [0.0])
        if batch is None or elements > remaining[0]:
            batch = Batch(group, h, [], [], [], [], is_sharded, key[-1], adapts_direction)
            remaining = [_max_batch_elements(w, batch)]
            open_batches[key] = batch, remaining
            batches.append(batch)
        remaining[0] -= elements
        batch.params.append(p)
        batch.weights.append(w)
        batch.grads.append(grad)
        batch.states.append(state)
    return batches


def _max_batch_elements(w: Tensor, batch: Batch) -> float:
    # Batches bound the scratch memory for float32 copies of 8-bit state, and for directions that wait for
    # their trust ratios. In a compiled step no kernel is launched, and the compiler manages directions.
    is_compiled = torch.compiler.is_compiling()
    unpacks = "min_8bit_size" in batch.group
    may_be_fused = uses_triton(w) and batch.group["fused"] is not False and not unpacks
    if may_be_fused and (is_compiled or triton_supports(w)):
        return _MAX_BATCH_ELEMENTS_IN_KERNEL if batch.adapts_direction and not is_compiled else math.inf
    return _MAX_BATCH_ELEMENTS_ON_CPU if w.device.type == "cpu" else _MAX_BATCH_ELEMENTS
