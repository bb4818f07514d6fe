"""Rules for the arguments of ``WarmupDecayLR``, one by one and in combination."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_lars.learning_rate.curves import COOLDOWNS, WARMUPS
from lightning_lars.rules import Rule, check, is_number, is_whole, one_of, require

DECAYS = ("constant", "cosine", "polynomial", "inverse_sqrt", "step", "wsd", "one_cycle")

_SHAPES = {"warmup": one_of(*WARMUPS), "decay": one_of(*DECAYS)}
_FRACTION_OF_PEAK = Rule(
    "a fraction of the peak in [0, 1]", lambda value: is_number(value) and 0 <= value <= 1
)
_FRACTIONS = {"start_factor": _FRACTION_OF_PEAK, "end_factor": _FRACTION_OF_PEAK}
_DECAY_OPTIONS = {
    "power": Rule(
        "above 0 and finite (1 is a straight line)", lambda value: is_number(value) and 0 < value < math.inf
    ),
    "gamma": Rule("in (0, 1] to decay", lambda value: is_number(value) and 0 < value <= 1),
}
_COOLDOWN = {"cooldown": one_of(*COOLDOWNS)}


def check_optimizer(optimizer: Any) -> None:
    """Raise unless it is an optimizer with a learning rate for every group."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}: build it first")
    for group in optimizer.param_groups:
        lr = group.get("lr")
        rule = "one with a number or a tensor as lr of every group (Adafactor: relative_step=False)"
        found = f"{type(optimizer).__name__} with lr={lr!r}"
        require("optimizer", rule, found, is_number(lr) or isinstance(lr, Tensor))


def check_steps(warmup_steps: int, total_steps: int | None) -> None:
    """Raise ValueError unless the warmup is shorter than the run."""
    rule = "an integer, at least 0 (0 is no warmup)"
    require("warmup_steps", rule, warmup_steps, is_whole(warmup_steps) and warmup_steps >= 0)
    if total_steps is None:
        return
    rule = "an integer, at least 1: the optimizer steps of the whole run"
    require("total_steps", rule, total_steps, is_whole(total_steps) and total_steps >= 1)
    rule = f"below total_steps={total_steps} (warm up for fewer steps or train for more)"
    require("warmup_steps", rule, warmup_steps, warmup_steps < total_steps)


def check_names(warmup: str, decay: str) -> None:
    """Raise ValueError unless these are names of shapes."""
    check(_SHAPES, {"warmup": warmup, "decay": decay})


def check_effects(warmup_steps: int, decay: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if an option is given, not None, that has no effect on the schedule."""
    used_by = {
        "end_factor": ("cosine", "polynomial", "wsd", "one_cycle"),
        "power": ("polynomial",),
        "milestones": ("step",),
        "gamma": ("step",),
        "cooldown_steps": ("wsd",),
        "cooldown": ("wsd",),
        "momentum_range": ("one_cycle",),
    }
    for option, value in options.items():
        has_effect = warmup_steps > 0 if option == "start_factor" else decay in used_by[option]
        rule = f"omitted with warmup_steps={warmup_steps} and decay={decay!r}, where it has no effect"
        require(option, rule, value, value is None or has_effect)


def check_milestones(milestones: Sequence[int], warmup_steps: int, total_steps: int | None) -> None:
    """Raise ValueError unless there are milestones, in ascending order, between warmup and end."""
    steps = [warmup_steps, *milestones] + ([] if total_steps is None else [total_steps])
    holds = bool(milestones) and all(map(is_whole, steps)) and all(a < b for a, b in pairwise(steps))
    bounds = f"above warmup_steps={warmup_steps} and below total_steps={total_steps}"
    require("milestones", f"ascending optimizer steps {bounds}", milestones, holds)


def check_cooldown(cooldown_steps: int | None, warmup_steps: int, total_steps: int | None) -> None:
    """Raise ValueError unless the cooldown fits behind the warmup."""
    rule = "an integer, at least 0 (0 is no cooldown yet)"
    is_length = cooldown_steps is None or (is_whole(cooldown_steps) and cooldown_steps >= 0)
    require("cooldown_steps", rule, cooldown_steps, is_length)
    longest = math.inf if total_steps is None else total_steps - warmup_steps
    rule = f"at most {longest}, what warmup_steps={warmup_steps} leaves of total_steps={total_steps}"
    require("cooldown_steps", rule, cooldown_steps, cooldown_steps is None or cooldown_steps <= longest)


def check_shapes(schedule: Mapping[str, Any]) -> None:
    """Raise ValueError if a parameter of the chosen shapes breaks its rule.

    Args:
        schedule: The arguments of a ``WarmupDecayLR``, with defaults filled in.
    """
    warmup, decay, warmup_steps = schedule["warmup"], schedule["decay"], schedule["warmup_steps"]
    start, total_steps = schedule["start_factor"], schedule["total_steps"]
    check(_FRACTIONS, schedule)
    is_cycle = decay == "one_cycle"
    first_step_has_it = warmup_steps > 0 and (is_cycle or warmup in ("constant", "exponential"))
    rule = f"above 0 with {(decay if is_cycle else warmup)!r}, to move the weights (for example 0.1)"
    require("start_factor", rule, start, start > 0 or not first_step_has_it)
    check(_DECAY_OPTIONS, schedule)
    if decay == "inverse_sqrt":
        rule = "at least 1 with decay='inverse_sqrt' (or use another decay)"
        require("warmup_steps", rule, warmup_steps, warmup_steps > 0)
    if decay == "step":
        check_milestones(schedule["milestones"], warmup_steps, total_steps)
    check_cooldown(schedule["cooldown_steps"], warmup_steps, total_steps)
    check(_COOLDOWN, schedule)
    if is_cycle:
        require("warmup", "'cosine' with decay='one_cycle'", warmup, warmup == "cosine")
        ends = schedule["momentum_range"]
        holds = len(ends) == 2 and all(map(is_number, ends)) and 0 <= ends[0] <= ends[1] < 1
        require("momentum_range", "(low, high) with 0 <= low <= high < 1", ends, holds)


def check_has_momentum(optimizer: Optimizer) -> None:
    """Raise ValueError unless every group has a momentum to schedule."""
    rule = "one with momentum or betas for decay='one_cycle' (LARS, LAMB, SGD, AdamW)"
    has_momentum = all("momentum" in group or "betas" in group for group in optimizer.param_groups)
    require("optimizer", rule, type(optimizer).__name__, has_momentum)
