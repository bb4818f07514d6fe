"""Layers sorted into batches that a back end updates together."""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
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

# A kernel keeps nothing but the directions, 256 MiB as well, and with 8-bit state not even these.
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
            remaining = [_max_elements_to_sort(w, batch)]
            open_batches[key] = batch, remaining
            batches.append(batch)
        remaining[0] -= elements
        batch.params.append(p)
        batch.weights.append(w)
        batch.grads.append(grad)
        batch.states.append(state)
    return batches


def divide(batch: Batch, in_kernel: bool) -> list[Batch]:
    """Divide a batch into batches that bound the scratch memory of a step.

    Scratch memory holds float32 copies of 8-bit state, and directions that wait for their trust ratios.

    Args:
        batch: The layers.
        in_kernel: Whether a Triton kernel runs the step.
    """
    if torch.compiler.is_compiling():  # sort_layers has divided what is to be divided
        return [batch]
    most: float = _max_elements(batch.weights[0])
    if in_kernel and (batch.in_eight_bit or "min_8bit_size" not in batch.group):
        keeps_directions = batch.adapts_direction and not batch.in_eight_bit
        most = _MAX_BATCH_ELEMENTS_IN_KERNEL if keeps_directions else math.inf
    starts, elements = [0], 0
    for i, w in enumerate(batch.weights):
        elements += w.numel()
        if elements > most and i > 0:
            starts.append(i)
            elements = w.numel()
    return [
        batch._replace(
            params=batch.params[start:end],
            weights=batch.weights[start:end],
            grads=batch.grads[start:end],
            states=batch.states[start:end],
        )
        for start, end in pairwise([*starts, len(batch.weights)])
    ]


def _max_elements_to_sort(w: Tensor, batch: Batch) -> float:
    # Where a kernel may run the step, a batch is divided once it is known whether it does. In a compiled step
    # no kernel is launched, and the compiler manages all memory but that of 8-bit state.
    may_be_fused = uses_triton(w) and batch.group["fused"] is not False
    is_compiled = torch.compiler.is_compiling()
    may_be_whole = "min_8bit_size" not in batch.group if is_compiled else triton_supports(w)
    return math.inf if may_be_fused and may_be_whole else _max_elements(w)


def _max_elements(w: Tensor) -> int:
    return _MAX_BATCH_ELEMENTS_ON_CPU if w.device.type == "cpu" else _MAX_BATCH_ELEMENTS
