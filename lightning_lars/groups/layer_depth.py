"""How deep every parameter lies in a model, for layer-wise learning-rate decay."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Size, nn

from lightning_lars.groups.block_stacks import BlockStacks, Stack
from lightning_lars.groups.parameter_names import Alias, aliases_of, closest, matches
from lightning_lars.rules import as_int, is_number, is_whole

LayerDepth = Mapping[str, int] | Callable[[str], int | None]
"""Layer ids by fnmatch patterns over parameter names, or a function from a name to a layer id or None."""

_WAY_OUT = (
    "pass layer_depth, a function from parameter names to layer ids or a mapping from patterns such as "
    "'encoder.3.*' to them: 0 for embeddings, then one for each block, and the highest for the head"
)


class Depths(NamedTuple):
    """The layer id of every parameter."""

    ids: dict[nn.Parameter, int]
    top: int
    """The id with the full learning rate."""

    def scale(self, depth: int, layer_decay: float) -> float:
        """Return ``layer_decay ** (top - depth)``, the factor on the learning rate of a layer."""
        return float(layer_decay ** (self.top - depth))


def layer_prefix(prefix: str, depth: int) -> str:
    """Return the beginning of the names of a layer's groups, after which ``part_of`` finds the part."""
    return f"{prefix}layer_{depth}."


def scale_rates(groups: Sequence[dict[str, Any]]) -> None:
    """Multiply the learning rate of every group by its ``lr_scale``.

    Raises:
        ValueError: If a group has no rate, or none has an ``lr_scale``.
    """
    if any(group.get("lr") is None for group in groups) or not any("lr_scale" in group for group in groups):
        raise ValueError(
            "layer_decay must be None where the groups of the optimizer have no lr and lr_scale, got an "
            "optimizer that has replaced the groups of param_groups"
        )
    for group in groups:
        group["lr"] = group["lr"] * group.get("lr_scale", 1.0)


def check_layer_decay(layer_decay: float | None, layer_depth: LayerDepth | None) -> None:
    """Raise unless ``layer_decay`` is None or in (0, 1], and ``layer_depth`` is given only with it."""
    if layer_depth is not None and not isinstance(layer_depth, Mapping) and not callable(layer_depth):
        raise TypeError(
            f"layer_depth must be a mapping from patterns to layer ids, or a function, got {layer_depth!r}"
        )
    if layer_decay is None:
        if layer_depth is not None:
            raise ValueError(f"layer_depth must be None without layer_decay, got {layer_depth!r}")
    elif not is_number(layer_decay) or not 0 < layer_decay <= 1:
        raise ValueError(
            f"layer_decay must be above 0 and at most 1, got {layer_decay!r}: it is the factor from each "
            "layer to the one before"
        )


def depths_of(
    module: nn.Module,
    shapes: Mapping[nn.Parameter, Size | None],
    layer_depth: LayerDepth | None = None,
    prefix: str = "",
) -> Depths:
    """Return the layer id of every parameter, frozen ones included, by the convention of BEiT and MAE.

    ::

        0        what comes before the first block: patch, token and position embeddings
        i + 1    block i
        n + 1    what comes after the last of n blocks: the final norm and the head

    The order is that in which modules were registered. What lies between two blocks, such as a downsampling
    layer, belongs to the second one. Parameters that no submodule owns, such as class tokens, come before the
    blocks, but a scalar, such as a temperature, after them.

    Args:
        module: The model, wrapped or not.
        shapes: The original shapes of its parameters.
        layer_depth: Layer ids that take precedence.
        prefix: What patterns may have before the names.

    Raises:
        ValueError: If there is no stack of blocks, or several, or ``layer_depth`` does not fit.
    """
    aliases = {parameter: named[0] for parameter, named in aliases_of(module).items()}
    own = _own_ids(aliases, layer_depth, prefix)
    if len(own) == len(aliases):
        return Depths(own, max(own.values(), default=0))
    stack = _stack_of(module, shapes)
    if stack is None:
        missing = next(alias.name for parameter, alias in aliases.items() if parameter not in own)
        raise ValueError(
            "module must hold its blocks in an nn.ModuleList or nn.Sequential for layer_decay, two or more "
            f"of one class, got {type(module).__name__} without, so no depth for {missing!r}: {_WAY_OUT}"
        )
    found = _positions(module, aliases, shapes, stack)
    ids = {parameter: own.get(parameter, found[parameter]) for parameter in aliases}
    return Depths(ids, max(len(stack.blocks) + 1, *own.values(), 0))


def _stack_of(module: nn.Module, shapes: Mapping[nn.Parameter, Size | None]) -> Stack | None:
    """Return the model's stack of blocks, beside which others (heads, the layers of a stem) are small."""
    stacks = BlockStacks(module, shapes).outermost()
    # A frozen copy of the model, such as the teacher of a student, does not count.
    stacks = [each for each in stacks if each.is_trained] or stacks
    sizes = [sum(_size(shapes[p]) for p in each.parameters()) for each in stacks]
    largest = max(sizes, default=0)
    main = [each for each, size in zip(stacks, sizes, strict=True) if 10 * size >= largest]
    if len(main) > 1:
        names = " and ".join(f"{each.name} ({len(each.blocks)} blocks)" for each in main)
        raise ValueError(
            f"module must have one stack of blocks for layer_decay, got {names}, of which none follows from "
            f"the order of the modules: {_WAY_OUT}"
        )
    return main[0] if main else None


def _positions(
    module: nn.Module,
    aliases: Mapping[nn.Parameter, Alias],
    shapes: Mapping[nn.Parameter, Size | None],
    stack: Stack,
) -> dict[nn.Parameter, int]:
    """Return the layer id of every parameter by the position of its module among the blocks."""
    number = len(stack.blocks)
    inside: dict[nn.Module, int] = {}
    for index, block in enumerate(stack.blocks):
        inside = {**dict.fromkeys(block.modules(), index), **inside}
    around = {each for each in module.modules() if stack.blocks[0] in set(each.modules())} - set(inside)
    ids: dict[nn.Module, int] = {}
    passed = 0
    for each in module.modules():
        if each in inside:
            passed = max(passed, inside[each] + 1)
            ids[each] = inside[each] + 1
        else:
            ids[each] = 0 if passed == 0 else passed + 1
    return {
        parameter: number + 1
        if alias.holder in around and _size(shapes[parameter]) == 1
        else ids[alias.holder]
        for parameter, alias in aliases.items()
    }


def _size(shape: Size | None) -> int:
    return 0 if shape is None else prod(shape)


def _own_ids(
    aliases: Mapping[nn.Parameter, Alias], layer_depth: LayerDepth | None, prefix: str
) -> dict[nn.Parameter, int]:
    """Return the layer ids that the user gives."""
    if layer_depth is None:
        return {}
    if isinstance(layer_depth, Mapping):
        names = [prefix + alias.name for alias in aliases.values()]
        for pattern in layer_depth:
            if not any(matches(alias.name, pattern, prefix) for alias in aliases.values()):
                raise ValueError(
                    "layer_depth must hold patterns that match a whole parameter name, got "
                    f"{pattern!r}, which matches none: {closest(str(pattern), names)}"
                )
    ids = {}
    for parameter, alias in aliases.items():
        depth = next(_given(layer_depth, alias.name, prefix), None)
        if depth is None:
            continue
        if not is_whole(depth) or depth < 0:
            raise ValueError(f"layer_depth must give integers, at least 0, got {depth!r} for {alias.name!r}")
        ids[parameter] = as_int(depth)
    return ids


def _given(layer_depth: LayerDepth, name: str, prefix: str) -> Iterator[int | None]:
    if isinstance(layer_depth, Mapping):
        yield from (depth for pattern, depth in layer_depth.items() if matches(name, pattern, prefix))
    else:
        yield layer_depth(name)
