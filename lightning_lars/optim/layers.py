"""The layers of a step: sorted into lists that can move together, and the norms they need for it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lars.optim.backends.choice import takes_triton, triton_can_do
from lightning_lars.optim.backends.triton_table import LayerTable
from lightning_lars.sharding.norms import Tensors, layer_norms, whole_norms
from lightning_lars.sharding.shards import Shard, local, local_gradient

# How many elements are worked on at once. Their updates exist at the same time, for weights of half precision
# beside a float32 copy: 256 MiB of scratch for four tensors of this size.
# On the CPU less, so that what was read for the norms is still in its cache.
_ELEMENTS_AT_ONCE, _ELEMENTS_AT_ONCE_ON_CPU = 2**24, 2**20

Shards = Mapping[Tensor, Shard | None]
"""For each parameter, where the rest of it is; None for one that no strategy has laid out."""


class Layers(NamedTuple):
    """Layers of one group that share a device and a dtype: what of them, and of their gradients, is here."""

    group: dict[str, Any]
    params: list[Tensor]
    parts: list[Tensor]
    grads: list[Tensor]
    are_divided: bool
    are_fused: bool = False
    """Whether kernels take their step."""


class Moving(NamedTuple):
    """Layers in the middle of a step, which wait for their whole norms."""

    layers: Layers
    lr: float | Tensor
    norms: tuple[Tensor, Tensor] | None
    """Of weights and direction, as far as they are here, each of shape ``(layers,)``; None without need."""

    weights: list[Tensor]
    direction: Tensors
    table: LayerTable | None = None
    """In place of weights and direction, where Triton's kernels take the step."""

    gradient_scale: Tensor | None = None


def sort_layers(group: dict[str, Any], shards: Shards, name: Callable[[Tensor], str]) -> Iterable[Layers]:
    """Sort the layers that have a gradient by device and dtype, and into parts of bounded size.

    Raises:
        RuntimeError: If a gradient is sparse, of another shape, or whole where its parameter is a DTensor.
    """
    sorted_layers: list[Layers] = []
    latest: dict[tuple[torch.device, torch.dtype, bool], Layers] = {}
    room: dict[tuple[torch.device, torch.dtype, bool], float] = {}
    for p in group["params"]:
        grad = p.grad
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"gradients must be dense, got a sparse one for parameter {name(p)!r}: "
                "build its module with sparse=False or give it to SparseAdam"
            )
        part, is_divided, shard = p, False, shards[p]
        if shard is not None:
            if hasattr(p, "device_mesh") and not hasattr(grad, "device_mesh"):
                raise RuntimeError(
                    f"the gradient of a DTensor must be one, got a plain tensor for parameter {name(p)!r}: "
                    "lay it out with torch.distributed.tensor.distribute_tensor()"
                )
            part, grad, is_divided = local(p), local_gradient(p), len(shard.groups) > 0
        if grad.shape != part.shape:
            raise RuntimeError(
                f"the gradient of parameter {name(p)!r} must have the parameter's shape, "
                f"{tuple(part.shape)}, got {tuple(grad.shape)}: set it to None where a parameter "
                "is given another shape"
            )
        kind, elements = (part.device, part.dtype, is_divided), part.numel()
        layers = latest.get(kind)
        if layers is None or elements > room[kind]:
            layers = latest[kind] = Layers(group, [], [], [], is_divided)
            room[kind] = _elements_at_once(part, group)
            sorted_layers.append(layers)
        room[kind] -= elements
        layers.params.append(p)
        layers.parts.append(part)
        layers.grads.append(grad)
    return sorted_layers


def _elements_at_once(part: Tensor, group: Mapping[str, Any]) -> float:
    needs_scratch = "min_8bit_size" in group  # for its state in float32
    may_be_fused = takes_triton(part) and group["fused"] is not False and not needs_scratch
    # No kernel is tried while a step is compiled, which needs no bound either.
    if may_be_fused and (torch.compiler.is_compiling() or triton_can_do(part)):
        return math.inf
    return _ELEMENTS_AT_ONCE_ON_CPU if part.device.type == "cpu" else _ELEMENTS_AT_ONCE


def norm_of_all(
    layers_with_grad: Sequence[Layers], params: Iterable[Tensor], shards: Shards
) -> Tensor | None:
    """Return the norm over all gradients, whole; None where there are none.

    A gradient that is not finite is left out, so that it spoils no other layer.
    """
    norms = [layer_norms(layers.grads) for layers in layers_with_grad if not layers.are_divided]
    divided = _divided(params, shards)
    if divided:
        here: dict[Tensor, Tensor] = {}
        for layers in layers_with_grad:
            if layers.are_divided:
                here.update(zip(layers.params, layer_norms(layers.grads).unbind(), strict=True))
        norms.append(torch.stack(whole_norms([here.get(p) for p in divided], list(divided.values()))))
    if not norms:
        return None
    norm_of_each = torch.cat([norm.to(norms[0], non_blocking=True) for norm in norms])
    norm: Tensor = torch.linalg.vector_norm(norm_of_each.where(norm_of_each.isfinite(), 0))
    return norm


def norms_of_divided(
    moving: Sequence[Moving], params: Iterable[Tensor], shards: Shards
) -> dict[Tensor, tuple[Tensor, Tensor]]:
    """Return the norms of weights and direction of those layers that are divided between processes.

    One exchange for all of them, which all processes join: a layer without a gradient here may have one
    elsewhere.

    Args:
        moving: Layers that are divided and have a gradient.
        params: All layers that may be divided, the same on every process.
        shards: Where the rest of each layer is.
    """
    divided = _divided(params, shards)
    if not divided:
        return {}
    weights: dict[Tensor, Tensor] = {}
    directions: dict[Tensor, Tensor] = {}
    for each in moving:
        assert each.norms is not None
        of_weights, of_direction = each.norms
        weights.update(zip(each.layers.params, of_weights.unbind(), strict=True))
        directions.update(zip(each.layers.params, of_direction.unbind(), strict=True))
    for p in divided:
        if p not in weights:
            # It belongs to the layer, though it gets no gradient here and stays where it is.
            weights[p] = layer_norms([local(p)])[0]
    here = [weights.get(p) for p in divided] + [directions.get(p) for p in divided]
    norms = whole_norms(here, [*divided.values(), *divided.values()])
    pairs = zip(norms[: len(divided)], norms[len(divided) :], strict=True)
    return dict(zip(divided, pairs, strict=True))


def stack_norms(
    params: Sequence[Tensor], norms: Mapping[Tensor, tuple[Tensor, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the norms of weights and direction of some layers, each of shape ``(layers,)``."""
    weight_norms, direction_norms = zip(*(norms[p] for p in params), strict=True)
    return torch.stack(weight_norms).to(device), torch.stack(direction_norms).to(device)


def moves_elsewhere(p: Tensor, shards: Shards) -> bool:
    """Tell whether a layer has a gradient, though nothing of it is here (FSDP1)."""
    shard = shards[p]
    return p.grad is None and shard is not None and shard.unit is not None and shard.unit.grad is not None


def _divided(params: Iterable[Tensor], shards: Shards) -> dict[Tensor, Shard]:
    divided = {}
    for p in params:
        shard = shards[p]
        if shard is not None and shard.groups:
            divided[p] = shard
    return divided
