"""Lists the parameters of optimizers by name and group, with the rule that put them there."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lars.groups.excluded_rate import part_of
from lightning_lars.groups.introspection import Layer, classify
from lightning_lars.groups.optimizer_names import by_name
from lightning_lars.groups.regrouping import inner_optimizer

# In parentheses, because users choose the names of groups.
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
    """Return every group by its name, or its number, in the notation of LearningRateMonitor."""
    groups: dict[str, dict[str, Any]] = {}
    for prefix, optimizer in by_name(optimizers).items():
        for number, group in enumerate(optimizer.param_groups, 1):
            name = f"{prefix}{group.get('name', f'pg{number}')}"
            groups[f"{name} ({number})" if name in groups else name] = group
    return groups


def entries_of(module: nn.Module, groups: Mapping[str, dict[str, Any]]) -> list[Entry]:
    """List the module's parameters in their order, then the optimizers' other parameters."""
    held: dict[Tensor, dict[str, str]] = {}
    for group_name, group in groups.items():
        names = group.get("param_names") or ["(no name)"] * len(group["params"])
        for p, name in zip(group["params"], names, strict=True):
            held.setdefault(p, {})[group_name] = name
    entries = []
    for layer in classify(module, strict=False):
        p = layer.parameter
        described = (layer.name, layer.module, *_size(p, layer.shape))
        if p not in held:
            entries.append(Entry(*described, LOST if p.requires_grad else FROZEN, ""))
        for group_name in held.pop(p, ()):
            entries.append(Entry(*described, group_name, _why(layer, groups[group_name])))
    for p, names_by_group in held.items():
        for group_name, name in names_by_group.items():
            entries.append(Entry(name, "not of the module", *_size(p, None), group_name, "-"))
    return entries


def reads_layer_adaptation(optimizer: Any) -> bool:
    """Return whether the optimizer, or one in it, reads the key ``layer_adaptation`` of its groups.

    One that does has a default for it; in the groups of any other the key has no effect.

    Example:
        >>> import torch
        >>> from lightning_lars import LARS
        >>> from lightning_lars.groups.contents import reads_layer_adaptation
        >>> layer = torch.nn.Linear(2, 2)
        >>> optimizers = LARS(layer.parameters()), torch.optim.Adam(layer.parameters())
        >>> [reads_layer_adaptation(each) for each in optimizers]
        [True, False]
    """
    defaults = [getattr(each, "defaults", {}) for each in (optimizer, inner_optimizer(optimizer))]
    return any("layer_adaptation" in each for each in defaults)


def _why(layer: Layer, group: Mapping[str, Any]) -> str:
    part = part_of(group)
    if not part:
        why = "-"
    elif part == "matrices":
        why = "matrix"
    elif part != layer.group:
        why = "own rule"
    else:
        why = layer.rule
    return why if layer.parameter.requires_grad else f"{why} {FROZEN}".lstrip()


def _size(p: Tensor, shape: Sequence[int] | None) -> tuple[str, int]:
    if is_lazy(p):
        return "lazy", 0
    shape = tuple(p.shape if shape is None else shape)
    return str(shape), prod(shape)
