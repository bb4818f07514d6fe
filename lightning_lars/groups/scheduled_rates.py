"""Learning rates of groups under a scheduler, of which many set one rate for all."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from lightning_lars.groups.excluded_rate import is_excluded, is_matrices, is_own_rate

# Where torch's schedulers keep rates: in each group, and in lists with an entry for each group.
_IN_GROUP = ("lr", "initial_lr", "max_lr", "min_lr")
_IN_LISTS = ("base_lrs", "max_lrs", "_last_lr")


def keep_group_rates(
    scheduler: Any,
    groups: Sequence[dict[str, Any]],
    excluded_lr: float | None,
    excluded_lr_scale: float,
    layer_decay: float | None,
    rates_of_matrices: Mapping[int, float] | None = None,
) -> None:
    """Restore the rates of groups that have their own under a scheduler that has set one for all groups.

    Args:
        scheduler: A scheduler that has not stepped yet.
        groups: All groups of its optimizer.
        excluded_lr: As in :func:`~lightning_lars.build_optimizer`.
        excluded_lr_scale: As in :func:`~lightning_lars.build_optimizer`.
        layer_decay: As in :func:`~lightning_lars.build_optimizer`.
        rates_of_matrices: From :func:`matrix_rates`, before the scheduler was created.

    Raises:
        ValueError: If the scheduler has per-group rates that contradict it, or ends above the rate of a
            group, or is of an unknown class.
    """
    of_matrices = rates_of_matrices or {}
    if not is_own_rate(excluded_lr, excluded_lr_scale) and layer_decay is None and not of_matrices:
        return
    kind = type(scheduler).__name__
    if layer_decay is not None and multiplies_by_lr_scale(scheduler):
        raise ValueError(
            f"layer_decay must be None with {kind}, which multiplies rates by lr_scale itself, got "
            f"{layer_decay!r}: return an optimizer over param_groups(model, layer_decay=...), without lr, "
            "and the scheduler from configure_optimizers"
        )
    for_layers = "" if layer_decay is None else f"{layer_decay=!r}"
    for_excluded = f"{excluded_lr=!r}" if excluded_lr is not None else f"{excluded_lr_scale=!r}"
    if not is_own_rate(excluded_lr, excluded_lr_scale):
        for_excluded = for_layers
    peaks = [peak([scheduler], group, index) for index, group in enumerate(groups)]
    wanted = _wanted(scheduler, groups, peaks, excluded_lr, excluded_lr_scale)
    wanted = [of_matrices.get(index, rate) for index, rate in enumerate(wanted)]
    one_rate_for_all = ValueError(
        f"{for_layers or for_excluded or 'matrix_optimizer'} must not be set with {kind}, which sets one "
        "learning rate for all groups: return an optimizer from build_optimizer, and a scheduler with a rate "
        "for each group, from configure_optimizers"
    )
    for index, group in enumerate(groups):
        argument = for_excluded if is_excluded(group) else for_layers
        argument = "the lr of matrix_optimizer" if index in of_matrices else argument
        if not argument:
            continue
        if not math.isclose(peaks[index], wanted[index], rel_tol=1e-6):
            if len(set(peaks)) > 1:
                raise ValueError(
                    f"{argument} and the rates of {kind} must agree, got {peaks[index]:g} for "
                    f"{group.get('name', 'a group')!r}: pass only one of them"
                )
            if unknown_schedulers(scheduler):
                raise one_rate_for_all
            rescale([scheduler], group, index, scale_to(wanted[index], peaks[index]))
        check_end(scheduler, groups, index, wanted[index], argument)
    rates = {float(group["lr"]) for group in groups}
    if len(rates) == 1 and rates != {0.0} and len(set(peaks)) > 1:
        raise one_rate_for_all


def matrix_rates(groups: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return the rates of the groups of matrices by their position, of optimizers without a scheduler."""
    return {index: float(group["lr"]) for index, group in enumerate(groups)
            if is_matrices(group) and "lr" in group}  # fmt: skip


def _wanted(
    scheduler: Any,
    groups: Sequence[Mapping[str, Any]],
    peaks: Sequence[float],
    excluded_lr: float | None,
    excluded_lr_scale: float,
) -> list[float]:
    """Return the peak that every group is to have, in proportion to the peak of the scheduler."""
    scales = [group.get("lr_scale", 1.0) for group in groups]
    # A scheduler that starts from the rates of the groups has scaled peaks already.
    own_peaks = any("max_lr" in group for group in groups) or _has_own_peaks(scheduler)
    sets_one = len(set(peaks)) == 1 and (len(set(scales)) > 1 or own_peaks)
    bases = list(peaks) if sets_one else [top / scale for top, scale in zip(peaks, scales, strict=True)]
    adapted = [
        base
        for base, group in zip(bases, groups, strict=True)
        if not is_excluded(group) and not is_matrices(group)
    ]
    wanted = []
    for group, base, scale in zip(groups, bases, scales, strict=True):
        base = adapted[0] if adapted else base
        if is_excluded(group) and excluded_lr is not None:
            base = excluded_lr
        elif is_excluded(group) and adapted:
            base *= excluded_lr_scale
        wanted.append(base * scale)
    return wanted


def multiplies_by_lr_scale(scheduler: Any) -> bool:
    """Return whether a scheduler, or a nested one, is timm's."""
    bases = [base for each in nested_schedulers(scheduler) for base in type(each).__mro__]
    return any(base.__module__.split(".")[0] == "timm" for base in bases)


def _has_own_peaks(scheduler: Any) -> bool:
    return any(hasattr(each, "max_lrs") for each in nested_schedulers(scheduler))


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


def scale_to(wanted: float, highest: float) -> float:
    """Return the scale ``wanted / highest`` for the rate of a group.

    Raises:
        ValueError: If ``highest`` is 0.
    """
    if highest == 0:
        raise ValueError(
            "lr must be above 0 under a scheduler where excluded parameters or layers have a separate rate, "
            "got 0: the schedule cannot be inferred from it"
        )
    return wanted / highest


def check_end(
    scheduler: Any, groups: Sequence[dict[str, Any]], index: int, wanted: float, argument: str
) -> None:
    """Raise ValueError if the scheduler ends at one rate for all groups, at or above this group's peak."""
    for each in nested_schedulers(scheduler):
        floor = getattr(each, "eta_min", 0.0)
        if floor > 0 and floor >= wanted:
            raise ValueError(
                f"{type(each).__name__} must end below the learning rate of every group, which is "
                f"{wanted:.4g} for {groups[index].get('name', 'one')!r} with {argument}, got "
                f"eta_min={floor!r} for all of them: lower it"
            )
        if type(each).__name__ == "SWALR" and len({float(group["swa_lr"]) for group in groups}) == 1:
            raise ValueError(
                f"swa_lr must have a rate for each group with {argument}, got "
                f"{groups[index]['swa_lr']!r} for all of them: pass a list"
            )
