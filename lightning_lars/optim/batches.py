"""The layers of a step, sorted into batches that can move together."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Hyperparameters
from lightning_lars.optim.backends.choice import triton_supports, uses_triton
from lightning_lars.sharding.shards import Shard, local, local_gradient

# How many elements are worked on at once. Their updates exist at the same time, for weights of half precision
# beside a float32 copy: 256 MiB of scratch for four tensors of this size.
# On the CPU less, so that what was read for the norms is still in its cache.
_MAX_BATCH_ELEMENTS, _MAX_BATCH_ELEMENTS_ON_CPU = 2**24, 2**20

Shards = Mapping[Tensor, Shard | None]
"""For each parameter, where the rest of it is; None for one that no strategy has laid out."""


class Batch(NamedTuple):
    """Layers of one group that share a device and a dtype: what of them, and of their gradients, is here."""

    group: dict[str, Any]
    h: Hyperparameters
    params: list[Tensor]
    weights: list[Tensor]
    grads: list[Tensor]
    states: list[Any]
    """The state dict of each layer, or None before it has one."""

    is_sharded: bool
    is_first: bool
    """Whether this is the first step of these layers."""

    adapts_direction: bool
    """Whether the direction, and the moments with it, come before the trust ratio."""

    in_eight_bit: bool = False
    """Whether a kernel reads and writes the moments in 8 bits."""


_Kind = tuple[torch.device, torch.dtype, bool, bool]


def sort_layers(
    group: dict[str, Any],
    h: Hyperparameters,
    adapts_direction: bool,
    states: Mapping[Any, Any],
    shards: Shards,
    is_first: Callable[[Tensor, Any], bool],
    name: Callable[[Tensor], str],
) -> Iterable[Batch]:
    """Sort the layers of a group that have a gradient by their kind, and into batches of bounded size.

    Raises:
        RuntimeError: If a gradient is sparse, of another shape, or whole where its parameter is a DTensor.
    """
    batches: list[Batch] = []
    latest: dict[_Kind, Batch] = {}
    room: dict[_Kind, float] = {}
    for p in group["params"]:
        grad = p.grad
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"gradients must be dense, got a sparse one for parameter {name(p)!r}: "
                "build its module with sparse=False or give it to SparseAdam"
            )
        part, is_sharded, shard = p, False, shards[p]
        if shard is not None:
            if hasattr(p, "device_mesh") and not hasattr(grad, "device_mesh"):
                raise RuntimeError(
                    f"the gradient of a DTensor must be one, got a plain tensor for parameter {name(p)!r}: "
                    "lay it out with torch.distributed.tensor.distribute_tensor()"
                )
            part, grad, is_sharded = local(p), local_gradient(p), len(shard.groups) > 0
        if grad.shape != part.shape:
            raise RuntimeError(
                f"the gradient of parameter {name(p)!r} must have the parameter's shape, "
                f"{tuple(part.shape)}, got {tuple(grad.shape)}: set it to None where a parameter "
                "is given another shape"
            )
        state = states.get(p)
        kind, elements = (part.device, part.dtype, is_sharded, is_first(p, state)), part.numel()
        batch = latest.get(kind)
        if batch is None or elements > room[kind]:
            batch = Batch(group, h, [], [], [], [], is_sharded, kind[-1], adapts_direction)
            latest[kind] = batch
            room[kind] = _max_batch_elements(part, batch)
            batches.append(batch)
        room[kind] -= elements
        batch.params.append(p)
        batch.weights.append(part)
        batch.grads.append(grad)
        batch.states.append(state)
    return batches


def _max_batch_elements(part: Tensor, batch: Batch) -> float:
    may_be_fused = uses_triton(part) and batch.group["fused"] is not False
    # For state in float32; and for directions until they are applied, but that is the compiler's care in a
    # step that is compiled, in which no kernel is tried.
    is_compiled = torch.compiler.is_compiling()
    needs_scratch = "min_8bit_size" in batch.group or (batch.adapts_direction and not is_compiled)
    if may_be_fused and not needs_scratch and (is_compiled or triton_supports(part)):
        return math.inf
    return _MAX_BATCH_ELEMENTS_ON_CPU if part.device.type == "cpu" else _MAX_BATCH_ELEMENTS
