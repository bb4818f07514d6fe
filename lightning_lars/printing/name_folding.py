"""Folds parameter names of repeated blocks into one: ``layer1.[0-2].bn[1-3].{weight,bias}``."""

import re
from collections.abc import Hashable, Iterable
from itertools import groupby
from math import prod
from typing import TypeVar

# What differs between the parameters of repeated blocks: a number, or weight and bias.
_SLOT = re.compile(r"(\d+|\b(?:weight|bias)$)")

Same = TypeVar("Same", bound=Hashable)
Parts = tuple[tuple[str, ...], ...]


def fold(names: Iterable[tuple[str, Same]]) -> list[tuple[str, int, Same]]:
    """Fold names that differ only in numbers, or in weight and bias, if their values are equal.

    A folded name stands for every combination of the alternatives in its brackets, and for no other name.

    Args:
        names: Pairs of a name and a value; only names with equal values are folded together.

    Returns:
        Folded names in order of first appearance, each with the number of names and the common value.

    Example:
        >>> from lightning_lars.printing.name_folding import fold
        >>> fold([("conv1.weight", "a"), ("bn1.weight", "b"), ("bn1.bias", "b"), ("bn2.weight", "b"),
        ...       ("bn2.bias", "b")])
        [('conv1.weight', 1, 'a'), ('bn[1-2].{weight,bias}', 4, 'b')]
    """
    # Every other part is a slot, which holds a tuple of alternatives.
    rows: list[tuple[Parts, Same]] = [
        (tuple((part,) for part in _SLOT.split(name)), same) for name, same in names
    ]
    for slot in range(1, max((len(parts) for parts, _ in rows), default=0), 2):
        merged: dict[Hashable, tuple[Parts, Same]] = {}
        for parts, same in rows:
            # Words and numbers are not mixed; names without the slot have nothing to merge.
            kind = _padding(parts[slot][0]) if slot < len(parts) else None
            key = (parts[:slot], kind, parts[slot + 1 :], same)
            if key in merged:
                before, _ = merged[key]
                parts = (*parts[:slot], before[slot] + parts[slot], *parts[slot + 1 :])
            merged[key] = (parts, same)
        rows = list(merged.values())
    return [("".join(map(_format, parts)), prod(map(len, parts)), same) for parts, same in rows]


def _format(alternatives: tuple[str, ...]) -> str:
    if len(alternatives) == 1:
        return alternatives[0]
    width = _padding(alternatives[0])
    if width is None:
        return f"{{{','.join(alternatives)}}}"
    numbers = sorted(map(int, alternatives))
    # In a run of consecutive numbers, number and position grow alike.
    runs = [list(run) for _, run in groupby(enumerate(numbers), lambda each: each[1] - each[0])]
    ends = [[f"{number:0{width}}" for _, number in (run[0], run[-1])] for run in runs]
    return f"[{','.join(low if low == high else f'{low}-{high}' for low, high in ends)}]"


def _padding(alternative: str) -> int | None:
    """Return the width to which a number is zero-padded, None for words."""
    if not alternative.isdigit():
        return None
    return len(alternative) if alternative[0] == "0" and len(alternative) > 1 else 1
