"""Layers that are divided between processes: which groups hold the rest, and what of it is here."""

import gc
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shard(NamedTuple):
    """Where the rest of a layer is."""

    groups: "tuple[ProcessGroup, ...]"
    """Processes among which it is divided, a group for each mesh dimension; none where each has it whole."""

    device: torch.device
    """Where these groups can reduce, which with offloaded parameters is not where the shard lies."""

    unit: Tensor | None = None
    """In FSDP1, the flat parameter that the shard is part of; it has a gradient if the shard would have."""


def find_shards(named_params: Iterable[tuple[str, Tensor]]) -> dict[Tensor, Shard]:
    """Tell of every DTensor (FSDP2, tensor parallel) and of every shard of FSDP1 where the rest is.

    Args:
        named_params: Parameters, with a name for messages.

    Returns:
        The shards by parameter, without the parameters that are plain tensors.

    Raises:
        RuntimeError: If a layer has no norm that can be known: FSDP1 with ``use_orig_params=False``, or
            with tensor parallelism inside it, or without its module; a DTensor with partial values.
    """
    shards: dict[Tensor, Shard] = {}
    flattened: list[tuple[str, Tensor]] = []
    for name, p in named_params:
        if hasattr(p, "device_mesh"):
            shards[p] = _shard_of_dtensor(name, p)
        elif getattr(p, "_is_flat_param", False):
            raise RuntimeError(
                f"parameter {name!r} is all layers of an FSDP unit in one tensor, whose norms cannot be told "
                "apart: wrap with FullyShardedDataParallel(..., use_orig_params=True)"
            )
        elif getattr(p, "_fsdp_flattened", False):
            flattened.append((name, p))
    if flattened:
        shards.update(_shards_of_fsdp1(flattened))
    # Two meshes over the same processes have groups of their own, and need not have two collectives.
    by_ranks: dict[tuple[int, ...], ProcessGroup] = {}
    return {
        p: shard._replace(groups=tuple(by_ranks.setdefault(_ranks(group), group) for group in shard.groups))
        for p, shard in shards.items()
    }


def is_laid_out(p: Tensor) -> bool:
    """Tell whether a strategy has marked a parameter as its own."""
    return hasattr(p, "device_mesh") or getattr(p, "_fsdp_flattened", False)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is here, sharing its memory; call it under ``torch.no_grad``."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "device_mesh") else tensor  # type: ignore[attr-defined]
    return part


def local_gradient(p: Tensor) -> Tensor:
    """Return the part of the gradient that belongs to the part of the parameter that is here.

    The gradient of a replicated parameter may be a sum whose terms lie on several processes (sequence
    parallelism): these are added up first.
    """
    grad = p.grad
    assert grad is not None
    if hasattr(p, "placements") and getattr(grad, "placements", p.placements) != p.placements:
        grad = grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return local(grad)


def laid_out_as(p: Tensor, part: Tensor) -> Tensor:
    """Return a local part as what the parameter is: a DTensor of its layout, or the plain tensor."""
    if not hasattr(p, "device_mesh"):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(p, DTensor)
    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def add_up(values: Sequence[Tensor], shards: "Sequence[Shard]") -> list[Tensor]:
    """Return every value summed over the processes that hold its layer: a collective for each group.

    Args:
        values: 0-d tensors of one dtype, on the device where their shard can be reduced.
        shards: For each value; the same on all processes, in the same order.
    """
    summed = list(values)
    members: dict[ProcessGroup, list[int]] = {}
    for i, shard in enumerate(shards):
        for group in shard.groups:
            members.setdefault(group, []).append(i)
    for group, indices in members.items():
        total = torch.stack([summed[i] for i in indices])
        dist.all_reduce(total, group=group)
        for i, value in zip(indices, total.unbind(), strict=True):
            summed[i] = value
    return summed


def _ranks(group: "ProcessGroup") -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _shard_of_dtensor(name: str, p: Any) -> Shard:
    if any(placement.is_partial() for placement in p.placements):
        raise RuntimeError(
            f"parameter {name!r} has Partial values, the sum of which is on no process: "
            f"redistribute it to Shard or Replicate, got {p.placements}"
        )
    mesh = p.device_mesh
    divided = [
        dimension
        for dimension, placement in enumerate(p.placements)
        if not placement.is_replicate() and mesh.size(dimension) > 1
    ]
    here = mesh.get_coordinate() is not None
    groups = tuple(mesh.get_group(dimension) for dimension in divided) if here else ()
    return Shard(groups, torch.empty(0, device=mesh.device_type).device)


def _shards_of_fsdp1(flattened: Sequence[tuple[str, Tensor]]) -> dict[Tensor, Shard]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    # A parameter of FSDP1 does not know its module, and the optimizer knows no module at all. The search
    # takes a tenth of a second, once. Handles have no public name.
    found: dict[Tensor, Shard] = {}
    divided_twice: set[Tensor] = set()
    for candidate in gc.get_objects():
        if not issubclass(type(candidate), FullyShardedDataParallel):
            continue
        # Not by attribute, which a module whose making has failed cannot answer.
        handle = vars(candidate).get("_handle")
        if handle is not None:
            groups = (handle.process_group,) if handle.uses_sharded_strategy else ()
            flat = handle.flat_param
            for p, extension in zip(flat._params or (), flat._param_extensions, strict=False):
                found[p] = Shard(groups, handle.device, flat)
                if extension is not None:
                    divided_twice.add(p)
    for name, p in flattened:
        if p not in found:
            raise RuntimeError(
                f"parameter {name!r} is a shard of FSDP, but its FullyShardedDataParallel module is gone, or "
                "hidden by gc.freeze(): build the optimizer on the parameters of the wrapped module that you "
                "train, and take its first step before gc.freeze()"
            )
        if p in divided_twice:
            raise RuntimeError(
                f"parameter {name!r} is divided by tensor parallelism and by FSDP1, where its norm is not "
                "known: use fully_shard (FSDP2, ModelParallelStrategy) with tensor parallelism"
            )
    return {p: found[p] for _, p in flattened}
