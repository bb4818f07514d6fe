"""Whether all ranks exchange the norms of the same layers, which is checked before the first exchange."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lars.sharding.shards import Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_ranks_agree(named: Sequence[tuple[str, Tensor]], shards: Mapping[Tensor, Shard]) -> None:
    """Raise on all ranks of a process group if they would exchange the norms of different layers.

    The norms are exchanged without names: ranks that list their layers in another order would use the norms
    of each other's layers. One all-reduce of three numbers for each process group finds out.

    Args:
        named: The layers whose norms are exchanged, in order, with their names.
        shards: How each layer is sharded; others are left out.

    Raises:
        RuntimeError: If the versions of torch or of this package, or the names, the shapes or the order of
            layers differ. It names the rank, and what it has.
    """
    members: dict[ProcessGroup, list[str]] = {}
    devices: dict[ProcessGroup, torch.device] = {}
    for name, p in named:
        shard = shards.get(p)
        if shard is not None and shard.device.type != "meta":
            for group in shard.groups:
                members.setdefault(group, _versions()).append(_described(name, p, shard))
                devices[group] = shard.device
    # In an order that does not depend on that of the layers: dimensions of a mesh differ in their stride.
    groups = sorted(members, key=_stride_and_ranks)
    differing: list[ProcessGroup] = []
    somewhere = False
    for group in groups:
        agrees, somewhere = _agree(members[group], somewhere, group, devices[group])
        if not agrees:
            differing.append(group)
    # All ranks of such a group know, and wait for each other: none may raise before the last.
    messages = [_difference(members[group], group) for group in differing]
    if messages:
        raise RuntimeError(
            "all ranks must have the same layers in the same order, and the same versions, because they "
            f"exchange norms: {messages[0]}. Build the same model and the same parameter groups on all "
            "ranks, in the same environment"
        )
    if somewhere:
        raise RuntimeError(
            "all ranks must have the same layers in the same order, and the same versions, because they "
            "exchange norms: a rank that shares no process group with this one has others, and raises an "
            "error that says which"
        )


def _versions() -> list[str]:
    try:
        own = version("lightning-lars")
    except PackageNotFoundError:  # a tree that was copied, not installed
        own = "0+unknown"
    return [f"torch {torch.__version__.split('+')[0]}", f"lightning-lars {own}"]


def _described(name: str, p: Tensor, shard: Shard) -> str:
    # In FSDP1 the shape of a shard differs from rank to rank.
    return f"{name!r}" if shard.unit is not None else f"{name!r} of shape {tuple(p.shape)}"


def _stride_and_ranks(group: "ProcessGroup") -> tuple[int, list[int]]:
    ranks = dist.get_process_group_ranks(group)
    return (ranks[1] - ranks[0] if len(ranks) > 1 else 0), ranks


def _agree(
    lines: Sequence[str], somewhere: bool, group: "ProcessGroup", device: torch.device
) -> tuple[bool, bool]:
    """Return whether the ranks of a group have the same, and whether any in this or other groups has not.

    Args:
        lines: What this rank has.
        somewhere: Whether this rank knows of a group whose ranks differ.
        group: The process group.
        device: Where it can reduce.
    """
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    bounds = torch.tensor([number, -number, somewhere], dtype=torch.int64, device=device)
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
    largest, smallest, known = bounds.tolist()
    agrees = largest == -smallest
    return agrees, not agrees or bool(known)


def _difference(lines: Sequence[str], group: "ProcessGroup") -> str:
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, list(lines), group=group)
    ranks = dist.get_process_group_ranks(group)
    return next(
        f"rank {rank} has {there} where rank {ranks[0]} has {here}"
        for rank, theirs in zip(ranks, everyone, strict=True)
        for here, there in zip_longest(everyone[0], theirs, fillvalue="no further layer")
        if here != there
    )
