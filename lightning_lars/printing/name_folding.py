"""Parameter names of repeated blocks in one: ``layer1.[0-2].bn[1-3].{weight,bias}``."""

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
    """Put names that differ in numbers, or in weight and bias, in one if all else about them is the same.

    A folded name stands for every combination of what is in its brackets, and for no other name.

    Args:
        names: Each with what must be the same.

    Returns:
        Folded names in order of their first, each with how many it stands for, and what is the same.

    Example:
        >>> from lightning_lars.printing.name_folding import fold
        >>> fold([("conv1.weight", "a"), ("bn1.weight", "b"), ("bn1.bias", "b"), ("bn2.weight", "b"),
        ...       ("bn2.bias", "b")])
        [('conv1.weight', 1, 'a'), ('bn[1-2].{weight,bias}', 4, 'b')]
    """
    # Every other part is a slot, which holds a tuple of what may stand there.
    rows: list[tuple[Parts, Same]] = [
        (tuple((part,) for part in _SLOT.split(name)), same) for name, same in names
    ]
    for slot in range(1, max((len(parts) for parts, _ in rows), default=0), 2):
        merged: dict[Hashable, tuple[Parts, Same]] = {}
        for parts, same in rows:
            # Words and numbers do not mix; names without the slot have nothing to merge.
            kind = _padding(parts[slot][0]) if slot < len(parts) else None
            key = (parts[:slot], kind, parts[slot + 1 :], same)
            if key in merged:
                before, _ = merged[key]
                parts = (*parts[:slot], before[slot] + parts[slot], *parts[slot + 1 :])
            merged[key] = (parts, same)
        rows = list(merged.values())
    return [("".join(map(_written, parts)), prod(map(len, parts)), same) for parts, same in rows]


def _written(alternatives: tuple[str, ...]) -> str:
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
    """Return how many digits a number is filled up to with zeros, None if it is no number."""
    if not alternative.isdigit():
        return None
    return len(alternative) if alternative[0] == "0" and len(alternative) > 1 else 1
