"""Splits the groups of an existing optimizer, and the per-group values of its schedulers."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_lars.groups.param_groups import EXCLUDED

# Lists of the schedulers of torch and timm with an entry for each group.
_PER_GROUP = {
    "_last_lr",
    "base_lrs",
    "base_momentums",
    "base_values",
    "lr_lambdas",
    "max_lrs",
    "max_momentums",
    "min_lrs",
    "restore_lr",
    "warmup_steps",
}
# Lists of schedulers of other packages that are unrelated to groups.
_NOT_PER_GROUP = {"_milestones", "_schedule_phases", "_schedulers", "decay_t", "milestones", "noise_range_t"}
_KNOWN_PACKAGES = ("torch", "lightning_lars", "lightning", "pytorch_lightning", "timm")


def split_groups(
    groups: Sequence[Mapping[str, Any]], excluded: Collection[Tensor], names: Mapping[Tensor, str]
) -> list[tuple[int, dict[str, Any]]]:
    """Split every group into an adapted and an excluded one, each with the index of its origin.

    Args:
        groups: The groups of an optimizer, which are not modified.
        excluded: Parameters that are to be neither adapted nor decayed.
        names: The names of parameters; if empty, the groups keep their own.

    Returns:
        New groups. They share no tensors, and their names are unique.
    """
    split: list[tuple[int, dict[str, Any]]] = []
    seen: Counter[str] = Counter()
    for number, group in enumerate(groups):
        # As in LearningRateMonitor, groups without a name are numbered.
        prefix = f"{group.get('name', f'pg{number + 1}')}/" if len(groups) > 1 or "name" in group else ""
        known = names or dict(zip(group["params"], group.get("param_names", ()), strict=False))
        for part, overrides in (("adapted", {}), ("excluded", EXCLUDED)):
            params = [p for p in group["params"] if (p in excluded) == (part == "excluded")]
            if not params:
                continue
            name = prefix + part
            seen[name] += 1
            values = {
                key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()
            }
            values |= {
                "params": params,
                "name": f"{name}-{seen[name]}" if seen[name] > 1 else name,
                **overrides,
            }
            if known:
                values["param_names"] = [known[p] for p in params]
            split.append((number, values))
    return split


def are_split(groups: Sequence[Mapping[str, Any]], split: Sequence[tuple[int, Mapping[str, Any]]]) -> bool:
    """Return whether the groups are already split as they would be."""
    return len(split) == len(groups) and all(
        groups[number].get(key) == part[key] for number, part in split for key in EXCLUDED if key in part
    )


def extend_per_group_values(scheduler: Any, optimizer: Optimizer, origins: Sequence[int]) -> None:
    """Extend the per-group values of a scheduler, and of schedulers nested in it, to the new groups.

    Args:
        scheduler: A scheduler of the optimizer.
        optimizer: The optimizer, with its old groups.
        origins: For each new group, the number of the old one.

    Raises:
        TypeError: If a scheduler has lists that may or may not be per group.
    """
    old = optimizer.param_groups
    for each in schedulers_in(scheduler, optimizer):
        is_known = type(each).__module__.split(".")[0] in _KNOWN_PACKAGES
        for attribute, kept in list(_attributes(each).items()):
            if not _may_be_per_group(kept, old):
                continue
            if attribute in _PER_GROUP:
                setattr(each, attribute, _extended(kept, origins))
            elif not is_known and attribute not in _NOT_PER_GROUP:
                raise TypeError(
                    f"{type(each).__name__} keeps {attribute!r}, which may or may not have an entry for each "
                    "group of the optimizer"
                )


def _may_be_per_group(kept: Any, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a scheduler's attribute may have an entry for each group: a list, an array or a dict."""
    if isinstance(kept, Mapping):
        names = [group.get("name") for group in groups]
        return list(kept) in (list(range(len(groups))), names)
    if isinstance(kept, str) or not hasattr(kept, "__getitem__") or not hasattr(kept, "__len__"):
        return False
    if getattr(kept, "ndim", 1) != 1 or len(kept) != len(groups):
        return False
    return any(isinstance(entry, Real | Tensor | Mapping) or callable(entry) for entry in kept)


def _extended(kept: Any, origins: Sequence[int]) -> Any:
    if isinstance(kept, list | tuple):
        return type(kept)(kept[origin] for origin in origins)
    if isinstance(kept, Mapping):
        values = list(kept.values())
        return {number: values[origin] for number, origin in enumerate(origins)}
    return kept[list(origins)]


def schedulers_in(scheduler: Any, optimizer: Optimizer) -> list[Any]:
    """Return a scheduler and all schedulers of the same optimizer nested in it, under any attribute.

    Empty if neither it nor a nested one refers to the optimizer.
    """
    found = [scheduler]
    for outer in found:
        for kept in list(_attributes(outer).values()):
            for each in kept if isinstance(kept, list | tuple) else [kept]:
                if _knows(each, optimizer) and not any(each is known for known in found):
                    found.append(each)
    return found if len(found) > 1 or _knows(scheduler, optimizer) else []


def _knows(scheduler: Any, optimizer: Optimizer) -> bool:
    return any(kept is optimizer for kept in _attributes(scheduler).values())


def _attributes(scheduler: Any) -> dict[str, Any]:
    return getattr(scheduler, "__dict__", {})


@contextmanager
def all_or_nothing(optimizers: Iterable[Optimizer], schedulers: Sequence[Any]) -> Iterator[None]:
    """Restore groups and schedulers if the block raises."""
    groups = [(optimizer, list(optimizer.param_groups)) for optimizer in optimizers]
    attributes = [
        (each, dict(_attributes(each)))
        for optimizer, _ in groups
        for scheduler in schedulers
        for each in schedulers_in(scheduler, optimizer)
        if _attributes(each)
    ]
    try:
        yield
    except BaseException:
        for optimizer, old in groups:
            optimizer.param_groups[:] = old
        for each, kept in attributes:
            vars(each).clear()
            vars(each).update(kept)
        raise


def inner_optimizer(optimizer: Optimizer) -> Optimizer | None:
    """Return a nested optimizer with separate groups, which would not be split, or None."""
    for each in vars(optimizer).values():
        if isinstance(each, Optimizer) and each.param_groups is not optimizer.param_groups:
            return each
    return None
