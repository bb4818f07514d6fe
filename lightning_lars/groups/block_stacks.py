"""Finds the stack of blocks in a model: a sequence of modules of one class, possibly in several stages."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Size, nn

from lightning_lars.groups.module_kinds import Kind, kinds_of
from lightning_lars.groups.parameter_names import clean_path, unwrapped, without_wrappers

_CONTAINERS = (nn.ModuleList, nn.Sequential)

# Networks have 3 to 6 stages; more modules with a container each are blocks of several layers (Xception).
_MOST_STAGES = 8


class Stack(NamedTuple):
    """Blocks that follow one another."""

    name: str
    blocks: list[nn.Module]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of all blocks."""
        for block in self.blocks:
            yield from block.parameters()

    @property
    def is_trained(self) -> bool:
        """Whether any block has a trainable parameter."""
        return any(p.requires_grad for p in self.parameters())


class BlockStacks:
    """The stacks of blocks of a model.

    A stack is an ``nn.ModuleList`` or ``nn.Sequential`` with at least two blocks of one class, such as the
    blocks of a vision transformer. It may be in stages: containers of blocks that follow one another (ResNet,
    ConvNeXt of torchvision), or modules that hold such a container each (Swin, ConvNeXt of timm), which are
    distinguished from blocks with containers of experts by their number and different widths.

    Args:
        root: The model.
        shapes: The original shapes of its parameters.
    """

    def __init__(self, root: nn.Module, shapes: Mapping[nn.Parameter, Size | None]) -> None:
        self._root = root
        self._shapes = shapes
        self._kinds = kinds_of(root)
        self._paths = dict(root.named_modules(remove_duplicate=False))

    def outermost(self) -> list[Stack]:
        """Return the stacks that are in no other.

        Plain layers of one shape, such as equally wide linear ones, count only where there are no other
        blocks and something follows them, so that neither a classifier nor a set of heads does.
        """
        found = self._below(unwrapped(self._root))
        blocks = [each for each in found if not self._is_layer(each.blocks[0])]
        if blocks:
            return blocks
        last = list(self._root.parameters())[-1:]
        return [
            each
            for each in found
            if len(set(map(self._widths, each.blocks))) == 1 and last[0] not in set(each.parameters())
        ]

    def _below(self, module: nn.Module) -> list[Stack]:
        """Return the outermost stacks at or below a module, and those of stages side by side as one."""
        blocks = self._blocks_in(module)
        if len(blocks) > 1:
            return [Stack(self._name(module), blocks)]
        children = self._children(module)
        in_child = [self._blocks_in(child) or self._stage(child) for child in children]
        stacked = self._repeated(in_child)
        here: dict[Kind, Stack] = {}
        deeper: list[Stack] = []
        for child, blocks in zip(children, in_child, strict=True):
            kind = self._kinds[blocks[0]] if blocks else None
            if kind is None or kind not in stacked:
                deeper += self._below(child)
            elif kind in here:
                here[kind] = Stack(f"{here[kind].name}, {self._name(child)}", here[kind].blocks + blocks)
            else:
                here[kind] = Stack(self._name(child), blocks)
        return [*here.values(), *deeper]

    def _blocks_in(self, module: nn.Module) -> list[nn.Module]:
        """Return the blocks of a container, through its stages; empty if it is no stack."""
        if not self._is_container(module):
            return []
        children = self._children(module)
        nested = [self._stage(child) for child in children]
        if self._repeated(nested):
            # Some stages may have blocks of several classes.
            stages = zip(children, nested, strict=True)
            return [block for child, blocks in stages for block in blocks or self._mixed_stage(child)]
        blocks = [child for child in children if not (self._is_layer(child) or self._is_container(child))]
        for candidates in (blocks, [child for child in children if not self._is_layer(child)], children):
            kinds = Counter(self._kinds[child] for child in candidates)
            same = [child for child in candidates if kinds[self._kinds[child]] > 1]
            if same:
                break
        if not same or (self._is_layer(same[0]) and len(kinds) > 1):
            return []
        inner = [self._held_stage(child) for child in same]
        are_stages = len(inner) <= _MOST_STAGES and all(inner) and max(map(len, inner)) > 1
        if are_stages and len({self._widths(child) for child in same}) > 1:
            return [block for blocks in inner for block in blocks]
        return same

    def _stage(self, module: nn.Module) -> list[nn.Module]:
        """Return the blocks of a container that holds nothing else."""
        if not self._is_container(module):
            return []
        blocks = self._children(module)
        if not blocks or len({self._kinds[block] for block in blocks}) > 1 or self._is_layer(blocks[0]):
            return []
        # Attention and feed-forward layer in the same wrapper are one block; a first block may hold more.
        names = [{without_wrappers(name) for name, _ in block.named_parameters()} for block in blocks]
        return blocks if all(min(names, key=len) <= each for each in names) else []

    def _mixed_stage(self, module: nn.Module) -> list[nn.Module]:
        """Return the children of a container that holds no plain layers, such as those of a norm."""
        blocks = self._children(module) if self._is_container(module) else []
        return [] if any(map(self._is_layer, blocks)) else blocks

    def _repeated(self, stages: Sequence[list[nn.Module]]) -> set[Kind]:
        """Return the classes of which the stages have two blocks or more."""
        kinds = Counter(self._kinds[block] for blocks in stages for block in blocks[:2])
        return {kind for kind, number in kinds.items() if number > 1}

    def _held_stage(self, module: nn.Module) -> list[nn.Module]:
        """Return the blocks of the container that a stage holds."""
        stages = [self._stage(child) for child in self._children(module)]
        stages = [blocks for blocks in stages if blocks and not self._is_container(blocks[0])]
        return max(stages, key=len, default=[])

    def _children(self, module: nn.Module) -> list[nn.Module]:
        """Return the children that hold parameters, without what wraps them."""
        children = [unwrapped(child) for name, child in module.named_children() if name != "parametrizations"]
        return [child for child in children if next(child.parameters(), None) is not None]

    def _is_container(self, module: nn.Module) -> bool:
        return self._kinds[module].is_a(*_CONTAINERS)

    def _is_layer(self, module: nn.Module) -> bool:
        """Return whether a module holds parameters itself, and no other module that does."""
        return not self._is_container(module) and not self._children(module)

    def _widths(self, module: nn.Module) -> tuple[Size | None, ...]:
        return tuple(self._shapes[parameter] for parameter in module.parameters())

    def _name(self, module: nn.Module) -> str:
        path = next(path for path, each in self._paths.items() if each is module)
        return clean_path(path, self._paths) or "the module itself"
