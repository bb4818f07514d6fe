"""The learning rate of the excluded group: proportional to the other rates, or separate."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lightning_lars.rules import is_number, require

# Where torch's schedulers keep rates: in each group, and in lists with an entry for each group.
_IN_GROUP = ("lr", "initial_lr", "max_lr", "min_lr")
_IN_LISTS = ("base_lrs", "max_lrs", "_last_lr")


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
            f"got {value!r}, which would have no effect"
        )
    if any(group.get("lr") is None for group in groups):
        raise ValueError(
            f"{argument} must be {unset} where the groups of the optimizer have no lr, got {value!r}"
        )
    for group in groups:
        group["lr"] = _rate(group["lr"], excluded_lr, excluded_lr_scale)
        mark_own_rate(group, excluded_lr)


def mark_own_rate(group: dict[str, Any], excluded_lr: float | None) -> None:
    """Exempt a group from ``BatchSizeScaling`` if its rate was set independently of the others."""
    if excluded_lr is not None:
        group["batch_size_scaling"] = False


def part_of(group: Mapping[str, Any]) -> str:
    """Return ``"adapted"`` or ``"excluded"`` for groups named by this package, else ""."""
    # ExcludeNormAndBias prepends the name of the group that it has split, param_groups a prefix.
    part = re.split(r"[./]", str(group.get("name", "")))[-1]
    return part if part in ("adapted", "excluded") else ""


def is_excluded(group: Mapping[str, Any]) -> bool:
    """Return whether a group is the excluded one of ``param_groups`` or ``ExcludeNormAndBias``."""
    return part_of(group) == "excluded"


def keep_excluded_rate(
    scheduler: Any,
    groups: Sequence[dict[str, Any]],
    excluded_lr: float | None,
    excluded_lr_scale: float,
) -> None:
    """Restore the rate of the excluded groups under a scheduler that has set one for all groups.

    Args:
        scheduler: A scheduler that has not stepped yet.
        groups: All groups of its optimizer.
        excluded_lr: As in :func:`~lightning_lars.build_optimizer`.
        excluded_lr_scale: As in :func:`~lightning_lars.build_optimizer`.

    Raises:
        ValueError: If the scheduler has per-group rates that contradict it, or ends above the rate, or is of
            an unknown class.
    """
    if not is_own_rate(excluded_lr, excluded_lr_scale):
        return
    argument = f"{excluded_lr=!r}" if excluded_lr is not None else f"{excluded_lr_scale=!r}"
    kind = type(scheduler).__name__
    one_rate_for_all = ValueError(
        f"{argument} must not be set with {kind}, which sets one learning rate for all groups: return an "
        "optimizer from build_optimizer, and a scheduler with a rate for each group, from "
        "configure_optimizers"
    )
    peaks = [peak([scheduler], group, index) for index, group in enumerate(groups)]
    excluded = [index for index, group in enumerate(groups) if is_excluded(group)]
    others = [peak for index, peak in enumerate(peaks) if index not in excluded]
    for index in excluded:
        if excluded_lr is not None or others:
            wanted = excluded_lr if excluded_lr is not None else others[0] * excluded_lr_scale
        else:
            wanted = peaks[index]
        if not math.isclose(peaks[index], wanted, rel_tol=1e-6):
            if len(set(peaks)) > 1:
                raise ValueError(
                    f"{argument} and the rates of {kind} must agree, got {peaks[index]:g} for the excluded "
                    "group: pass only one of them"
                )
            if unknown_schedulers(scheduler):
                raise one_rate_for_all
            rescale([scheduler], groups[index], index, excluded_scale(wanted, peaks[index]))
        check_end(scheduler, groups, index, wanted, argument)
    rates = {float(group["lr"]) for group in groups}
    if len(rates) == 1 and rates != {0.0} and len(set(peaks)) > 1:
        raise one_rate_for_all


def rescale(schedulers: Sequence[Any], group: dict[str, Any], index: int, factor: float) -> None:
    """Multiply the rates of one group, including the copies that torch's schedulers keep."""
    for key in _IN_GROUP:
        if key in group:
            group[key] = group[key] * factor
    for each in nested_schedulers(*schedulers):
        for attribute in _IN_LISTS:
            kept = getattr(each, attribute, None)
            if isinstance(kept, list) and index < len(kept):
                setattr(each, attribute, [*kept[:index], kept[index] * factor, *kept[index + 1 :]])


def unknown_schedulers(*schedulers: Any) -> list[str]:
    """Return the class names of schedulers whose rates neither torch nor this package computes."""
    getters = {type(each): getattr(type(each), "get_lr", None) for each in nested_schedulers(*schedulers)}
    return [
        kind.__name__
        for kind, get_lr in getters.items()
        if not issubclass(kind, LRScheduler)
        or not getattr(get_lr, "__module__", "").startswith(("torch.optim.", "lightning_lars."))
    ]


def nested_schedulers(*schedulers: Any) -> Iterator[Any]:
    """Yield schedulers and the schedulers nested in them (``SequentialLR``, ``ChainedScheduler``)."""
    for scheduler in schedulers:
        yield scheduler
        yield from nested_schedulers(*getattr(scheduler, "_schedulers", ()))


def peak(schedulers: Sequence[Any], group: Mapping[str, Any], index: int) -> float:
    """Return the highest rate of a group under its schedulers."""
    cycles = [each.max_lrs[index] for each in nested_schedulers(*schedulers) if hasattr(each, "max_lrs")]
    return float(cycles[0] if cycles else group.get("max_lr", group.get("initial_lr", group["lr"])))


def excluded_scale(wanted: float, highest: float) -> float:
    """Return the scale ``wanted / highest`` for the rate of the excluded group.

    Raises:
        ValueError: If ``highest`` is 0.
    """
    if highest == 0:
        raise ValueError(
            "lr must be above 0 under a scheduler where excluded parameters have a separate rate, got 0: the "
            "schedule cannot be inferred from it"
        )
    return wanted / highest


def _rate(lr: float | Tensor, excluded_lr: float | None, excluded_lr_scale: float) -> float | Tensor:
    if excluded_lr is None:
        return lr * excluded_lr_scale
    return lr.new_full(lr.shape, excluded_lr) if isinstance(lr, Tensor) else excluded_lr


def check_end(
    scheduler: Any, groups: Sequence[dict[str, Any]], index: int, wanted: float, argument: str
) -> None:
    """Raise ValueError if the scheduler ends at one rate for all groups, at or above this group's peak."""
    for each in nested_schedulers(scheduler):
        floor = getattr(each, "eta_min", 0.0)
        if floor > 0 and floor >= wanted:
            raise ValueError(
                f"{type(each).__name__} must end below {argument}, got eta_min={floor!r} for all groups: "
                "lower it"
            )
        if type(each).__name__ == "SWALR" and len({float(group["swa_lr"]) for group in groups}) == 1:
            raise ValueError(
                f"swa_lr must have a rate for each group with {argument}, got "
                f"{groups[index]['swa_lr']!r} for all of them: pass a list"
            )
