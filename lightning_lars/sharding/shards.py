"""Layers that are sharded across ranks: their process groups and their local shards."""

import gc
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shard(NamedTuple):
    """How a layer is sharded: over which process groups, and on which device these reduce."""

    groups: "tuple[ProcessGroup, ...]"
    """The process groups that shard the layer, one for each mesh dimension that does not replicate it."""

    device: torch.device
    """Where these groups can reduce; with offloaded parameters, not the device of the shard."""

    unit: Tensor | None = None
    """In FSDP1, the flat parameter that the shard is part of; it has a gradient if the shard would have."""


def find_shards(named_params: Iterable[tuple[str, Tensor]]) -> dict[Tensor, Shard]:
    """Find which parameters are sharded, and over which process groups.

    A sharded parameter is a DTensor (FSDP2, tensor parallelism) or a shard of FSDP1.

    Args:
        named_params: Parameters, with names for error messages.

    Returns:
        The shards by parameter, without the parameters that are plain tensors.

    Raises:
        RuntimeError: If the norm of a layer cannot be computed: FSDP1 with ``use_orig_params=False``, with
            tensor parallelism inside it, or without its module; a DTensor with partial values.
    """
    shards: dict[Tensor, Shard] = {}
    flattened: list[tuple[str, Tensor]] = []
    for name, p in named_params:
        if hasattr(p, "device_mesh"):
            shards[p] = _shard_of_dtensor(name, p)
        elif getattr(p, "_is_flat_param", False):
            raise RuntimeError(
                f"parameter {name!r} holds all layers of an FSDP unit in one tensor, from which their norms "
                "cannot be computed: wrap with FullyShardedDataParallel(..., use_orig_params=True)"
            )
        elif getattr(p, "_fsdp_flattened", False):
            flattened.append((name, p))
    if flattened:
        shards.update(_shards_of_fsdp1(flattened))
    # Two meshes over the same ranks have separate groups, but do not need separate collectives.
    by_ranks: dict[tuple[int, ...], ProcessGroup] = {}
    groups = dict.fromkeys(group for shard in shards.values() for group in shard.groups)
    shared = {group: by_ranks.setdefault(_ranks(group), group) for group in groups}
    return {
        p: shard._replace(groups=tuple(shared[group] for group in shard.groups))
        for p, shard in shards.items()
    }


def is_distributed(p: Tensor) -> bool:
    """Return whether a parameter is a DTensor or a shard of FSDP1."""
    return hasattr(p, "device_mesh") or getattr(p, "_fsdp_flattened", False)


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a tensor, sharing its memory; call it under ``torch.no_grad``."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "device_mesh") else tensor  # type: ignore[attr-defined]
    return shard


def local_gradient(p: Tensor) -> Tensor:
    """Return the gradient of the local shard of a parameter.

    The gradient of a replicated parameter may be partial sums on several ranks (sequence parallelism): these
    are reduced first.
    """
    grad = p.grad
    assert grad is not None
    if hasattr(p, "placements") and getattr(grad, "placements", p.placements) != p.placements:
        grad = grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return local(grad)


def laid_out_as(p: Tensor, part: Tensor) -> Tensor:
    """Return a local shard as a DTensor if the parameter is one, otherwise as it is."""
    if not hasattr(p, "device_mesh"):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(p, DTensor)
    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def start_sums(values: Sequence[Tensor], shards: "Sequence[Shard]") -> Callable[[], list[Tensor]]:
    """Begin to sum every value over the ranks that hold its layer, by one all-reduce per process group.

    Args:
        values: 0-d tensors of one dtype, on the device where their shard can be reduced.
        shards: For each value; the same on all ranks, in the same order.

    Returns:
        A function, to be called once, that waits for the sums and returns them. The first all-reduce runs
        meanwhile; the others begin in this function, since they continue with its sums.
    """
    summed = list(values)
    members: dict[ProcessGroup, list[int]] = {}
    for i, shard in enumerate(shards):
        for group in shard.groups:
            members.setdefault(group, []).append(i)

    def start(group: "ProcessGroup") -> tuple[Tensor, Any]:
        total = torch.stack([summed[i] for i in members[group]])
        # torch.compile cannot trace an asynchronous all-reduce.
        return total, dist.all_reduce(total, group=group, async_op=not torch.compiler.is_compiling())

    running = [start(group) for group in islice(members, 1)]

    def finish() -> list[Tensor]:
        for group, indices in members.items():
            total, work = running.pop() if running else start(group)
            if work is not None:
                work.wait()
            for i, value in zip(indices, total.unbind(), strict=True):
                summed[i] = value
        return summed

    return finish


def _ranks(group: "ProcessGroup") -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _shard_of_dtensor(name: str, p: Any) -> Shard:
    if any(placement.is_partial() for placement in p.placements):
        raise RuntimeError(
            f"parameter {name!r} has Partial values, whose sum is on no rank: "
            f"redistribute it to Shard or Replicate, got {p.placements}"
        )
    mesh = p.device_mesh
    sharding_dimensions = [
        dimension
        for dimension, placement in enumerate(p.placements)
        if not placement.is_replicate() and mesh.size(dimension) > 1
    ]
    is_in_mesh = mesh.get_coordinate() is not None
    groups = tuple(mesh.get_group(dimension) for dimension in sharding_dimensions) if is_in_mesh else ()
    # Where the shape of a step is tried out before there is memory for it, so is its all-reduce.
    device = "meta" if p.is_meta else mesh.device_type
    return Shard(groups, torch.empty(0, device=device).device)


def _shards_of_fsdp1(flattened: Sequence[tuple[str, Tensor]]) -> dict[Tensor, Shard]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    # A parameter of FSDP1 has no reference to its module, and neither has the optimizer. The search takes a
    # tenth of a second, once. Handles have no public name.
    found: dict[Tensor, Shard] = {}
    sharded_twice: set[Tensor] = set()
    for candidate in gc.get_objects():
        if not issubclass(type(candidate), FullyShardedDataParallel):
            continue
        # Not by attribute access, which fails if the module's constructor has raised.
        handle = vars(candidate).get("_handle")
        if handle is not None:
            groups = (handle.process_group,) if handle.uses_sharded_strategy else ()
            flat = handle.flat_param
            for p, extension in zip(flat._params or (), flat._param_extensions, strict=False):
                found[p] = Shard(groups, handle.device, flat)
                if extension is not None:
                    sharded_twice.add(p)
    for name, p in flattened:
        if p not in found:
            raise RuntimeError(
                f"parameter {name!r} is a shard of FSDP, but its FullyShardedDataParallel module is gone, or "
                "hidden by gc.freeze(): build the optimizer on the parameters of the wrapped module that you "
                "train, and take its first step before gc.freeze()"
            )
        if p in sharded_twice:
            raise RuntimeError(
                f"parameter {name!r} is sharded by both tensor parallelism and FSDP1, so that its norm "
                "cannot be computed: use fully_shard (FSDP2, ModelParallelStrategy) with tensor parallelism"
            )
    return {p: found[p] for _, p in flattened}
