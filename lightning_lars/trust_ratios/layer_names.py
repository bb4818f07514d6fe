"""The names of an optimizer's layers, and the patterns that select some of them."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from lightning_lars.optim.parameters import named_params


def names_by_number(named: Mapping[str, Tensor], names: Mapping[Tensor, str]) -> dict[str, str]:
    """Map the numbers that an optimizer uses for unnamed parameters to their names.

    Args:
        named: Parameters of the optimizer, by name or number.
        names: Names of parameters, of this optimizer or others.

    Example:
        >>> import torch
        >>> from lightning_lars.trust_ratios.layer_names import names_by_number
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> names_by_number({"0": w}, {w: "head.weight"})
        {'0': 'head.weight'}
    """
    return {
        number: names[p]
        for number, p in named.items()
        if number.isdigit() and p in names and names[p] not in named
    }


def adapted_layers(optimizer: Any, names: Mapping[Tensor, str]) -> list[str]:
    """Return the names of the adapted parameters of an optimizer.

    Args:
        optimizer: An optimizer, with names or without.
        names: Names of parameters, for those that are unnamed in the optimizer.
    """
    named = dict(named_params(optimizer.param_groups))
    by_number = names_by_number(named, names)
    groups = [group for group in optimizer.param_groups if group.get("layer_adaptation", True)]
    adapted = {p for group in groups for p in group["params"]}
    return [by_number.get(name, name) for name, p in named.items() if p in adapted]


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError if an fnmatch pattern matches none of the names, unless there are none."""
    for pattern in patterns:
        if names and not any(fnmatchcase(name, pattern) for name in names):
            close = get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ValueError(
                f"layers must match the name of an adapted layer, got {pattern!r}; the closest are "
                f"{', '.join(map(repr, close))}"
            )
