"""What optimizers hold, by name and group, and which rule put it there."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parameter import is_lazy

from lightning_lars.introspection import DEFAULT_EXCLUDED, Layer, classify

# In parentheses, as the groups have names of the user's choice.
LOST, FROZEN = "(in no optimizer)", "(frozen)"


class Entry(NamedTuple):
    """A parameter in one of its groups."""

    name: str
    module: str
    shape: str
    elements: int
    group: str
    why: str


def groups_by_name(optimizers: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Return every group by its name, or its number, as LearningRateMonitor calls them."""
    groups = {}
    seen: Counter[str] = Counter()
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        prefix = f"{kind}-{seen[kind]}/" if seen[kind] else f"{kind}/"
        seen[kind] += 1
        for number, group in enumerate(optimizer.param_groups, 1):
            name = str(group.get("name", f"pg{number}"))
            name = prefix + name if len(optimizers) > 1 else name
            groups[f"{name} ({number})" if name in groups else name] = group
    return groups


def entries_of(
    module: nn.Module, groups: Mapping[str, dict[str, Any]], shapes: Mapping[Tensor, Sequence[int]]
) -> list[Entry]:
    """Return the module's parameters in its order, then those of the optimizers that are not the module's."""
    held: dict[Tensor, dict[str, str]] = {}
    for group_name, group in groups.items():
        names = group.get("param_names") or ["(no name)"] * len(group["params"])
        for p, name in zip(group["params"], names, strict=True):
            held.setdefault(p, {})[group_name] = name
    entries = []
    for layer in classify(module, DEFAULT_EXCLUDED, exclude_bias=True):
        p = layer.parameter
        described = (layer.name, type(layer.owner).__name__, *_size(p, shapes))
        if p not in held:
            entries.append(Entry(*described, LOST if p.requires_grad else FROZEN, ""))
        for group_name in held.pop(p, ()):
            entries.append(Entry(*described, group_name, _why(layer, groups[group_name])))
    for p, names_by_group in held.items():
        for group_name, name in names_by_group.items():
            entries.append(Entry(name, "not of the module", *_size(p, shapes), group_name, "-"))
    return entries


def _why(layer: Layer, group: Mapping[str, Any]) -> str:
    # ExcludeNormAndBias puts the name of the group that it has split before its own.
    part = str(group.get("name", "")).rpartition("/")[2]
    if part not in ("adapted", "excluded"):
        why = "-"
    elif part != layer.group:
        why = "own rule"
    else:
        why = layer.rule
    return why if layer.parameter.requires_grad else f"{why} {FROZEN}".lstrip()


def _size(p: Tensor, shapes: Mapping[Tensor, Sequence[int]]) -> tuple[str, int]:
    if is_lazy(p):
        return "lazy", 0
    shape = tuple(shapes.get(p, p.shape))
    return str(shape), prod(shape)


def shapes_in_fsdp1(model: nn.Module) -> dict[Tensor, Sequence[int]]:
    """Return the shapes of those parameters that FSDP1 has flattened and cut."""
    shapes: dict[Tensor, Sequence[int]] = {}
    for module in model.modules():
        # Only its handle knows them, which has no public name.
        handle = getattr(module, "_handle", None) if isinstance(module, FullyShardedDataParallel) else None
        if handle is not None:
            shapes.update(zip(handle.flat_param._params or (), handle.flat_param._shapes, strict=False))
    return shapes
