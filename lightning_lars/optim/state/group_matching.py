"""Matches the parameter groups of a state dict, and their hyperparameters, to an optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_lars.optim.state.name_matching import (
    Groups,
    are_names,
    describe_differences,
    may_match,
    names_of,
    order_by_name,
    quote,
)

_NOT_HYPERPARAMETERS = ("params", "param_names", "name", "fused")


def match_groups(
    saved_groups: Groups, own_groups: Groups, warn: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return the groups of a state dict, regrouped like the groups of the optimizer.

    Where both sides have names, parameters are matched by them
    (:func:`~lightning_lars.optim.state.name_matching.order_by_name`), otherwise by position, as in
    ``torch.optim``.

    Args:
        saved_groups: The groups of the state dict.
        own_groups: The groups of the optimizer.
        warn: Called with the text of each warning.

    Returns:
        For each group of the optimizer, its hyperparameters in the state dict and, as ``"params"``, the
        numbers of its parameters there.

    Raises:
        ValueError: If parameters cannot be matched, or a group would have contradicting hyperparameters.
    """
    saved_names, own_names = names_of(saved_groups), names_of(own_groups)
    # FSDP1 and torch.distributed.checkpoint match names themselves, and use the order of the optimizer.
    is_fsdp1 = any(getattr(p, "_fsdp_flattened", False) for group in own_groups for p in group["params"])
    order = None if is_fsdp1 else order_by_name(saved_names, own_names)
    if order is not None:
        numbers = [number for group in saved_groups for number in group["params"]]
        in_order = iter([numbers[place] for place in order])
        params = [[next(in_order) for _ in group["params"]] for group in own_groups]
        options = _options_by_group(saved_groups, own_groups, params, warn)
    elif _sizes(saved_groups) == _sizes(own_groups) and (
        is_fsdp1 or are_names(saved_groups) or all(map(may_match, saved_names, own_names))
    ):
        params = [list(group["params"]) for group in saved_groups]
        options = [_options(group) for group in saved_groups]
    else:
        raise ValueError(_no_match(saved_groups, own_groups))
    return [{**group, "params": numbers} for group, numbers in zip(options, params, strict=True)]


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
    """Return the saved hyperparameters for each group of the optimizer.

    Raises:
        ValueError: If they contradict each other where saved groups are split or merged.
    """
    source = {number: index for index, group in enumerate(saved_groups) for number in group["params"]}
    sources = [list(dict.fromkeys(source[number] for number in numbers)) for numbers in params]
    options = list(map(_options, saved_groups))
    for index, saved in enumerate(options):
        targets = [number for number, indices in enumerate(sources) if index in indices]
        differing = _differing([own_groups[number] for number in targets], saved)
        if differing:
            raise ValueError(
                f"{_misfit(saved_groups, own_groups)}: group {index} of the state dict is split among the "
                f"groups {targets} here, which differ in {quote(differing)}. {_REMEDY}"
            )
    regrouped: list[dict[str, Any]] = []
    for number, indices in enumerate(sources):
        merged = [options[index] for index in indices]
        differing = _differing(merged, dict.fromkeys(key for each in merged for key in each))
        if differing:
            raise ValueError(
                f"{_misfit(saved_groups, own_groups)}: group {number} here merges groups {indices} of the "
                f"state dict, which differ in {quote(differing)}. {_REMEDY}"
            )
        regrouped.append(merged[0] if merged else {})
    is_reordered = any(indices not in ([], [number]) for number, indices in enumerate(sources))
    has_scheduler = any("initial_lr" in group for group in own_groups)
    if is_reordered and has_scheduler and _differing(regrouped, ["lr"]):
        warn(
            "The groups of the state dict are in another order than the optimizer's. Hyperparameters "
            "are matched by parameter names, but a scheduler stores learning rates by position: before "
            "loading its state too, build the optimizer with the groups in the order of the state dict"
        )
    return regrouped


_REMEDY = (
    "Build both with the same groups; or delete these keys from the groups of the state dict to keep the "
    "optimizer's values"
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
    difference = describe_differences(names_of(saved_groups), names_of(own_groups))
    if _sizes(saved_groups) != _sizes(own_groups):
        reason = f": {difference}" if difference else ""
        return f"{_misfit(saved_groups, own_groups)}{reason}. Build both over the same parameters"
    return (
        f"state_dict must have the names of the optimizer's parameters, but {difference or 'names repeat'}. "
        'Rename them in "param_names" of its groups, or delete "param_names" to match by position'
    )
