"""Which group of a state dict is which of the optimizer's, and what hyperparameters that gives."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_lars.optim.state.name_matching import (
    Groups,
    are_names,
    how_names_differ,
    may_be_one,
    names_of,
    order_by_name,
    quote,
)

_NOT_HYPERPARAMETERS = ("params", "param_names", "name", "fused")


def match_groups(
    saved_groups: Groups, own_groups: Groups, warn: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return the groups of a state dict divided and ordered as the optimizer's.

    Where both sides have names, parameters are matched by them
    (:func:`~lightning_lars.optim.state.name_matching.order_by_name`), otherwise by position, as in
    ``torch.optim``.

    Args:
        saved_groups: Of the state dict.
        own_groups: Of the optimizer.
        warn: Called with what the user should know of.

    Returns:
        For each group of the optimizer the hyperparameters that the state dict has for it and, in
        ``"params"``, the numbers of its parameters there.

    Raises:
        ValueError: If parameters cannot be matched, or it is open which group has which hyperparameters.
    """
    saved_names, own_names = names_of(saved_groups), names_of(own_groups)
    # FSDP1 and torch.distributed.checkpoint have matched their names, and follow the order of the optimizer.
    is_fsdp1 = any(getattr(p, "_fsdp_flattened", False) for group in own_groups for p in group["params"])
    order = None if is_fsdp1 else order_by_name(saved_names, own_names)
    if order is not None:
        numbers = [number for group in saved_groups for number in group["params"]]
        in_order = iter([numbers[place] for place in order])
        params = [[next(in_order) for _ in group["params"]] for group in own_groups]
        options = _options_by_group(saved_groups, own_groups, params, warn)
    elif _sizes(saved_groups) == _sizes(own_groups) and (
        is_fsdp1 or are_names(saved_groups) or all(map(may_be_one, saved_names, own_names))
    ):
        params = [list(group["params"]) for group in saved_groups]
        options = [_options(group) for group in saved_groups]
    else:
        raise ValueError(_no_match(saved_groups, own_groups))
    return [{**of_group, "params": numbers} for of_group, numbers in zip(options, params, strict=True)]


def _sizes(groups: Groups) -> list[int]:
    return [len(group["params"]) for group in groups]


def _options(group: Any) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _NOT_HYPERPARAMETERS}


def _options_by_group(
    saved_groups: Groups,
    own_groups: Groups,
    params: Sequence[Sequence[Any]],
    warn: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return the hyperparameters of each group of the optimizer, as far as groups do not contradict."""
    source = {number: index for index, group in enumerate(saved_groups) for number in group["params"]}
    sources = [list(dict.fromkeys(source[number] for number in numbers)) for numbers in params]
    options = list(map(_options, saved_groups))
    for index, of_saved in enumerate(options):
        heirs = [number for number, of_group in enumerate(sources) if index in of_group]
        differing = _differing([own_groups[number] for number in heirs], of_saved)
        if differing:
            raise ValueError(
                f"{_misfit(saved_groups, own_groups)}: group {index} of the state dict is divided among "
                f"{heirs} here, which differ in {quote(differing)}. {_REMEDY}"
            )
    divided: list[dict[str, Any]] = []
    for number, of_group in enumerate(sources):
        united = [options[index] for index in of_group]
        differing = _differing(united, dict.fromkeys(key for each in united for key in each))
        if differing:
            raise ValueError(
                f"{_misfit(saved_groups, own_groups)}: group {number} here unites {of_group} of the state "
                f"dict, which differ in {quote(differing)}. {_REMEDY}"
            )
        divided.append(united[0] if united else {})
    is_moved = any(of_group not in ([], [number]) for number, of_group in enumerate(sources))
    if is_moved and any("initial_lr" in group for group in own_groups) and _differing(divided, ["lr"]):
        warn(
            "The groups of the state dict are not in the order of the optimizer's. Hyperparameters follow "
            "the names of the parameters, but a scheduler keeps its rates by position: before loading its "
            "state too, build the optimizer with the groups in the order of the state dict"
        )
    return divided


_REMEDY = (
    "Build both with the same groups; or take these keys out of the groups of the state dict, and they stay "
    "as they are here"
)


def _differing(groups: Groups, keys: Any) -> list[str]:
    missing = object()
    return [
        key
        for key in keys
        if any(not _equal(group.get(key, missing), groups[0].get(key, missing)) for group in groups[1:])
    ]


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        both = isinstance(left, Tensor | float | int) and isinstance(right, Tensor | float | int)
        return both and float(left) == float(right)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return list(left) == list(right)
    return bool(left == right)


def _misfit(saved_groups: Groups, own_groups: Groups) -> str:
    return (
        f"state_dict must have the parameter groups of the optimizer, with {_sizes(own_groups)} parameters, "
        f"got groups of {_sizes(saved_groups)}"
    )


def _no_match(saved_groups: Groups, own_groups: Groups) -> str:
    difference = how_names_differ(names_of(saved_groups), names_of(own_groups))
    if _sizes(saved_groups) != _sizes(own_groups):
        reason = f": {difference}" if difference else ""
        return f"{_misfit(saved_groups, own_groups)}{reason}. Build both over the same parameters"
    return (
        f"state_dict must have the names of the optimizer's parameters, but {difference or 'names repeat'}. "
        'Rename them in "param_names" of its groups, or delete "param_names" to match by position'
    )
