"""The learning rate of the excluded groups: proportional to the other rates, or separate."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_lars.rules import is_number, require


def check_excluded_rate(excluded_lr: float | None, excluded_lr_scale: float) -> None:
    """Raise ValueError unless at most one of the two is given, above 0 and finite."""
    for argument, value in (("excluded_lr_scale", excluded_lr_scale), ("excluded_lr", excluded_lr)):
        if value is None and argument == "excluded_lr":
            continue
        if not is_number(value) or not 0 < value < math.inf:
            raise ValueError(
                f"{argument} must be above 0 and finite, got {value!r}: "
                "to freeze parameters, use requires_grad_(False)"
            )
    rule = f"None with excluded_lr_scale={excluded_lr_scale!r}: only one of the two may set the rate"
    require("excluded_lr", rule, excluded_lr, excluded_lr is None or excluded_lr_scale == 1.0)


def is_own_rate(excluded_lr: float | None, excluded_lr_scale: float) -> bool:
    """Return whether the excluded group has a different rate from the rest."""
    return excluded_lr is not None or excluded_lr_scale != 1.0


def set_excluded_rate(
    groups: Sequence[dict[str, Any]], excluded_lr: float | None, excluded_lr_scale: float
) -> None:
    """Set the learning rate of excluded groups, before a scheduler is created.

    ``excluded_lr`` is multiplied by the ``lr_scale`` that ``layer_decay`` gives a group.

    Raises:
        ValueError: If there is a rate to set and no group, or no group with a learning rate.
    """
    if not is_own_rate(excluded_lr, excluded_lr_scale):
        return
    argument, value, unset = (
        ("excluded_lr_scale", excluded_lr_scale, 1.0)
        if excluded_lr is None
        else ("excluded_lr", excluded_lr, None)
    )
    if not groups:
        raise ValueError(
            f"{argument} must be {unset} where no parameter is excluded, "
            f"got {value!r}, which would have no effect: remove it, from a recipe with "
            f'**recipes.lars(...) | {{"{argument}": {unset}}}'
        )
    if any(group.get("lr") is None for group in groups):
        raise ValueError(
            f"{argument} must be {unset} where the groups of the optimizer have no lr, got {value!r}"
        )
    for group in groups:
        scale = 1.0 if excluded_lr is None else group.get("lr_scale", 1.0)
        group["lr"] = _rate(group["lr"], excluded_lr, excluded_lr_scale) * scale
        mark_own_rate(group, excluded_lr)


def mark_own_rate(group: dict[str, Any], excluded_lr: float | None) -> None:
    """Exempt a group from ``BatchSizeScaling`` if its rate was set independently of the others."""
    if excluded_lr is not None:
        group["batch_size_scaling"] = False


def part_of(group: Mapping[str, Any]) -> str:
    """Return ``"adapted"``, ``"excluded"`` or ``"matrices"`` for groups named by this package, else ""."""
    # ExcludeNormAndBias prepends the name of the group that it has split, param_groups a prefix.
    part = re.split(r"[./]", str(group.get("name", "")))[-1]
    return part if part in ("adapted", "excluded", "matrices") else ""


def is_excluded(group: Mapping[str, Any]) -> bool:
    """Return whether a group is the excluded one of ``param_groups`` or ``ExcludeNormAndBias``."""
    return part_of(group) == "excluded"


def is_matrices(group: Mapping[str, Any]) -> bool:
    """Return whether a group is that of the matrices of ``param_groups``."""
    return part_of(group) == "matrices"


def _rate(lr: float | Tensor, excluded_lr: float | None, excluded_lr_scale: float) -> float | Tensor:
    if excluded_lr is None:
        return lr * excluded_lr_scale
    return lr.new_full(lr.shape, excluded_lr) if isinstance(lr, Tensor) else excluded_lr
