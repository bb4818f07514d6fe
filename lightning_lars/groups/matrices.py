"""Finds the matrices of a model's hidden layers, for an optimizer that is made for them, such as Muon."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Size, nn

from lightning_lars.groups.block_stacks import BlockStacks
from lightning_lars.groups.introspection import Layer
from lightning_lars.groups.module_kinds import kinds_of
from lightning_lars.groups.parameter_names import aliases_of, closest, matches
from lightning_lars.groups.parameter_roles import Place

Matrices = Mapping[str, bool] | Callable[[str], bool | None]
"""What is a matrix, by fnmatch patterns over parameter names, or a function from a name to a bool or None."""

MATRICES = "matrices"
"""The name of the group."""


def check_matrices(matrices: bool | Matrices | None) -> None:
    """Raise TypeError unless ``matrices`` is None, a flag, a mapping to flags, or a function."""
    is_flags = isinstance(matrices, Mapping) and all(isinstance(flag, bool) for flag in matrices.values())
    if not (matrices is None or isinstance(matrices, bool) or is_flags or callable(matrices)):
        raise TypeError(
            "matrices must be a mapping from patterns over parameter names to True or False, or a function, "
            f"got {matrices!r}"
        )


def with_matrices(
    module: nn.Module, layers: Sequence[Layer], matrices: bool | Matrices, prefix: str = ""
) -> list[Layer]:
    """Return the layers, with the adapted matrices of hidden layers in the group ``"matrices"``.

    A matrix is a weight with two dimensions, both above 1, of a linear layer or of an attention's
    projections, that is used nowhere else. It is hidden if it is inside of the model's blocks; where these
    hold none, or there are no blocks, if it is not the last one, which computes the output.

    Args:
        module: The model, wrapped or not.
        layers: Its layers, classified.
        matrices: Whether to look for any; patterns and functions take precedence for adapted layers.
        prefix: What patterns may have before the names.

    Raises:
        ValueError: If a pattern matches no adapted layer, or the shape of a linear layer is unknown.
        TypeError: If a function returns neither a bool nor None.
    """
    if matrices is False:
        return list(layers)
    aliases, kinds = aliases_of(module), kinds_of(module)
    adapted = [layer for layer in layers if layer.group == "adapted" and layer.parameter.requires_grad]
    names = {layer.parameter: aliases[layer.parameter][0].name for layer in adapted}
    own = {} if matrices is True else _own_choice(names, matrices, prefix)
    linear = [
        layer
        for layer in adapted
        if layer.parameter not in own
        and all(_is_linear(Place(alias, kinds[alias.owner])) for alias in aliases[layer.parameter])
        and _is_matrix(layer)
    ]
    shapes = {layer.parameter: layer.shape for layer in layers}
    hidden = _hidden(module, linear, shapes)
    rules = dict.fromkeys(hidden, "hidden matrix") | {p: rule for p, (flag, rule) in own.items() if flag}
    return [
        layer._replace(group=MATRICES, rule=rules[layer.parameter]) if layer.parameter in rules else layer
        for layer in layers
    ]


def _hidden(
    module: nn.Module, linear: Sequence[Layer], shapes: Mapping[nn.Parameter, Size | None]
) -> set[nn.Parameter]:
    """Return those matrices that are neither in the input nor in the output layers."""
    stacks = BlockStacks(module, shapes).outermost()
    in_blocks = {p for stack in stacks for p in stack.parameters()}
    inside = {layer.parameter for layer in linear if layer.parameter in in_blocks}
    return inside or {layer.parameter for layer in linear[:-1]}


# Layers of other packages and of the user with a matrix, by a word in the class name; the 1-D convolution of
# transformers is a linear layer. Embeddings and recurrent cells are not among them.
_LINEAR_WORD = re.compile(r"Attention|Attn|Conv1D|Dense|Expert|FFN|FeedForward|Linear|MLP|Mlp|Proj|Router")
_OTHER_WORD = re.compile(r"Cell|Embed|GRU|LSTM|RNN")
_WEIGHT = re.compile(r"(([a-z]+_)?proj_|.*_)?weight(_v|_orig)?")
_OTHER_LAYERS = (nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase)


def _is_linear(place: Place) -> bool:
    """Return whether the parameter is the weight of a linear layer or of an attention's projections."""
    kind = place.kind
    if kind.is_a(*_OTHER_LAYERS) or not _WEIGHT.fullmatch(place.alias.attribute):
        return False
    if kind.is_a(nn.Linear, nn.MultiheadAttention):
        return True
    return bool(_LINEAR_WORD.search(kind.name)) and not _OTHER_WORD.search(kind.name)


def _is_matrix(layer: Layer) -> bool:
    if layer.shape is None:
        raise ValueError(
            f"the shape of {layer.name!r} must be known, because it decides whether this is a matrix: call "
            "this after a first forward, which initializes lazy modules, pass the wrapper that knows it, or "
            "pass matrices with a choice for it"
        )
    return len(layer.shape) == 2 and min(layer.shape) > 1


def _own_choice(
    names: Mapping[nn.Parameter, str], matrices: Matrices, prefix: str
) -> dict[nn.Parameter, tuple[bool, str]]:
    """Return what the user says of adapted layers, with the rule that says so."""
    if isinstance(matrices, Mapping):
        for pattern in matrices:
            if not any(matches(name, pattern, prefix) for name in names.values()):
                raise ValueError(
                    f"matrices must hold patterns that match the whole name of an adapted parameter, got "
                    f"{pattern!r}, which matches none: "
                    f"{closest(str(pattern), [prefix + name for name in names.values()])}"
                )
    own = {}
    for parameter, name in names.items():
        flag, rule = next(_choices(matrices, name, prefix), (None, ""))
        if isinstance(flag, bool):
            own[parameter] = flag, rule
        elif flag is not None:
            raise TypeError(f"matrices must return True, False or None, got {flag!r} for {name!r}")
    return own


def _choices(matrices: Any, name: str, prefix: str) -> Iterator[tuple[Any, str]]:
    if isinstance(matrices, Mapping):
        yield from ((flag, repr(pat)) for pat, flag in matrices.items() if matches(name, pat, prefix))
    else:
        yield matrices(name), getattr(matrices, "__name__", repr(matrices))
