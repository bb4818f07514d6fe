"""Validates the parameters of an optimizer, and names them."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor


def named_params(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, Tensor]]:
    """Pair every parameter with its name, or with its number in the state dict where it has none."""
    pairs: list[tuple[str, Tensor]] = []
    for group in groups:
        names = group.get("param_names")
        # A group whose parameters were replaced may have names left from before.
        if not names or len(names) != len(group["params"]):
            names = map(str, range(len(pairs), len(pairs) + len(group["params"])))
        pairs.extend(zip(names, group["params"], strict=True))
    return pairs


def check_params(params: list[Any], groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the parameters of a new group; if only the other groups have names, name them by number.

    Raises:
        TypeError: If an entry is not a tensor or a ``(name, tensor)`` pair.
        ValueError: If a parameter is complex, integer, not a leaf, or given twice, or if a name is.
    """
    if any("param_names" in group for group in groups):
        before = sum(len(group["params"]) for group in groups)
        if all(isinstance(p, Tensor) for p in params):
            params = [(str(before + index), p) for index, p in enumerate(params)]
    seen = set(chain.from_iterable(group["params"] for group in groups))
    seen_names = set(chain.from_iterable(group.get("param_names", ()) for group in groups))
    for index, entry in enumerate(params):
        name, p = entry if isinstance(entry, tuple) and len(entry) == 2 else (None, entry)
        if not isinstance(p, Tensor):
            raise TypeError(f"params must be tensors or (name, tensor) pairs, got {p!r} at {index}")
        label = f"parameter {index if name is None else name!r}"
        _check_param(p, label, seen)
        if name is not None and name in seen_names:
            raise ValueError(
                f"params must have unique names, got {name!r} twice: prefix each name with its module's"
            )
        seen_names.add(name)
    return params


def recheck_params(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError if the groups were changed to hold parameters that construction would reject."""
    seen: set[Tensor] = set()
    for name, p in named:
        _check_param(p, f"parameter {name!r}", seen)


def _check_param(p: Tensor, label: str, seen: set[Tensor]) -> None:
    if not p.is_floating_point():
        remedy = "" if p.requires_grad else ". It is not trained: filter by requires_grad"
        raise ValueError(f"params must be real floating-point tensors, got {label} of {p.dtype}{remedy}")
    if not p.is_leaf:
        raise ValueError(
            f"params must be leaf tensors, got {label}, which is the result of an operation: "
            "pass the parameter that it is computed from"
        )
    if p in seen:
        raise ValueError(f"params must hold every parameter once, got {label} twice")
    seen.add(p)
