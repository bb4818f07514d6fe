"""Joins the state dicts of several optimizers to one over all parameters, and takes it apart again."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch.optim import Optimizer

from lightning_lars.optim.state.group_matching import match_groups

_Groups = Sequence[dict[str, Any]]

OTHERS = "optimizers"
"""The key for what the state dicts of some optimizers hold besides groups and states of parameters."""


def joined(optimizers: Sequence[Optimizer], groups: _Groups) -> dict[str, Any]:
    """Return one state dict with the groups in this order, and parameters numbered over all of them.

    Args:
        optimizers: The optimizers.
        groups: All their groups.
    """
    packed: list[dict[str, Any]] = [{}] * len(groups)
    place = {id(group): index for index, group in enumerate(groups)}
    ends = [0]
    for group in groups:
        ends.append(ends[-1] + len(group["params"]))
    state: dict[Any, Any] = {}
    others: list[dict[str, Any]] = []
    for optimizer in optimizers:
        saved = optimizer.state_dict()
        number: dict[Any, int] = {}
        for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            index = place[id(own)]
            number.update(zip(group["params"], range(ends[index], ends[index + 1]), strict=True))
            packed[index] = {**group, "params": [number[each] for each in group["params"]]}
        state |= {number[key]: value for key, value in saved["state"].items() if key in number}
        unnumbered = {key: value for key, value in saved["state"].items() if key not in number}
        other = {key: value for key, value in saved.items() if key not in ("state", "param_groups")}
        others.append({**other, "state": unnumbered} if unnumbered else other)
    return {"state": state, "param_groups": packed, **({OTHERS: others} if any(others) else {})}


def taken_apart(
    saved: Mapping[str, Any], optimizers: Sequence[Optimizer], groups: _Groups, warn: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return the part of a state dict for each optimizer.

    Groups are matched by the names of their parameters where both sides have names, otherwise by position.
    Hyperparameters that the state dict does not have keep the optimizer's values.

    Args:
        saved: A state dict of :func:`joined`.
        optimizers: The optimizers.
        groups: All their groups, in the order of the state dict.
        warn: Called with the text of each warning.

    Raises:
        ValueError: If this is no state dict of an optimizer over the same parameters.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        got = list(saved) if isinstance(saved, Mapping) else saved
        raise ValueError(
            f'state_dict must be an optimizer state dict, with "state" and "param_groups", got {got!r}: in a '
            'Lightning checkpoint, use an element of checkpoint["optimizer_states"]'
        )
    others = saved.get(OTHERS, [{}] * len(optimizers))
    if len(others) != len(optimizers):
        expected = f"{len(optimizers)} optimizer{'s' * (len(optimizers) != 1)}"
        raise ValueError(f"state_dict must be of {expected}, got one of {len(others)}")
    matched = dict(zip(map(id, groups), match_groups(saved["param_groups"], groups, warn), strict=True))
    parts = []
    for optimizer, other in zip(optimizers, others, strict=True):
        of_optimizer = [{**own, **matched[id(own)]} for own in optimizer.param_groups]
        numbers = chain.from_iterable(group["params"] for group in of_optimizer)
        state = {number: saved["state"][number] for number in numbers if number in saved["state"]}
        parts.append({**other, "state": {**state, **other.get("state", {})}, "param_groups": of_optimizer})
    return parts
