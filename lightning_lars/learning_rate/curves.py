"""Warmup and decay of the learning rate as pure functions of the optimizer step.

Every curve maps an optimizer step to a factor on the base learning rate, the peak. Steps count from 1, so the
first step already moves the weights, even if a curve starts at ``start_factor=0``. A warmup is 1 from step
``warmup_steps`` on, a decay is 1 until then. With

    progress = (step - 1 - warmup_steps) / (total_steps - warmup_steps)        clamped to [0, 1]

the first step after the warmup is at the peak, the last step is just short of ``end_factor`` and still moves
the weights, and all steps after ``total_steps`` stay at ``end_factor``.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from lightning_lars.rules import require


def constant_warmup(step: int, warmup_steps: int, start_factor: float) -> float:
    """Return ``start_factor`` before step ``warmup_steps``, then 1."""
    return 1.0 if step >= warmup_steps else start_factor


def linear_warmup(step: int, warmup_steps: int, start_factor: float) -> float:
    """Return ``start_factor + (1 - start_factor) * step / warmup_steps``, then 1 (Goyal et al. 2017).

    Example:
        >>> [linear_warmup(step, warmup_steps=4, start_factor=0.0) for step in range(1, 7)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    return 1.0 if step >= warmup_steps else start_factor + (1 - start_factor) * step / warmup_steps


def exponential_warmup(step: int, warmup_steps: int, start_factor: float) -> float:
    """Return ``start_factor ** (1 - step / warmup_steps)``, then 1.

    Raises:
        ValueError: If ``start_factor`` is 0, from which no exponential reaches 1.
    """
    require("start_factor", "above 0", start_factor, start_factor > 0)
    return 1.0 if step >= warmup_steps else float(start_factor ** (1 - step / warmup_steps))


def cosine_warmup(step: int, warmup_steps: int, start_factor: float) -> float:
    """Return ``start_factor + (1 - start_factor) * (1 - cos(pi * step / warmup_steps)) / 2``, then 1."""
    return 1.0 if step >= warmup_steps else _anneal(start_factor, 1.0, step / warmup_steps)


def constant_decay(step: int) -> float:
    """Return 1 at every step: no decay."""
    return 1.0


def cosine_decay(step: int, warmup_steps: int, total_steps: int, end_factor: float = 0.0) -> float:
    """Return ``end_factor + (1 - end_factor) * (1 + cos(pi * progress)) / 2`` (Loshchilov & Hutter 2017)."""
    return _anneal(1.0, end_factor, _progress(step, warmup_steps, total_steps))


def polynomial_decay(
    step: int, warmup_steps: int, total_steps: int, power: float = 2.0, end_factor: float = 0.0
) -> float:
    """Return ``end_factor + (1 - end_factor) * (1 - progress) ** power`` (power 2: You et al. 2017)."""
    remaining = 1 - _progress(step, warmup_steps, total_steps)
    return float(end_factor + (1 - end_factor) * remaining**power)


def inverse_sqrt_decay(step: int, warmup_steps: int) -> float:
    """Return ``sqrt(warmup_steps / step)`` after step ``warmup_steps`` (Vaswani et al. 2017).

    Raises:
        ValueError: If ``warmup_steps`` is below 1, where the rate would be 0 throughout.
    """
    require("warmup_steps", "at least 1", warmup_steps, warmup_steps >= 1)
    return math.sqrt(warmup_steps / max(step, warmup_steps))


def step_decay(step: int, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """Return ``gamma`` to the power of the number of ``milestones`` before ``step`` (Goyal et al. 2017)."""
    return float(gamma ** sum(milestone < step for milestone in milestones))


def wsd_decay(
    step: int, total_steps: int, cooldown_steps: int, cooldown: str = "linear", end_factor: float = 0.0
) -> float:
    """Return 1 until the cooldown, the last ``cooldown_steps`` of ``total_steps``: warmup, stable, decay.

    ::

        linear   end_factor + (1 - end_factor) * (1 - p)
        sqrt     end_factor + (1 - end_factor) * (1 - sqrt(p))         Haegele et al. 2024, arXiv:2405.18392
        cosine   end_factor + (1 - end_factor) * (1 + cos(pi * p)) / 2

    with ``p = (step - 1 - (total_steps - cooldown_steps)) / cooldown_steps`` kept in [0, 1]. The name is that
    of Hu et al. 2024, arXiv:2404.06395. Nothing before the cooldown depends on ``total_steps``.

    Example:
        >>> [wsd_decay(step, total_steps=6, cooldown_steps=4) for step in range(1, 8)]
        [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if cooldown_steps == 0:
        return 1.0
    progress = _progress(step, total_steps - cooldown_steps, total_steps)
    return end_factor + (1 - end_factor) * COOLDOWNS[cooldown](progress)


def one_cycle(
    step: int,
    warmup_steps: int,
    total_steps: int,
    start_factor: float = 1 / 25,
    end_factor: float = 1 / 250_000,
) -> float:
    """Return a cosine from ``start_factor`` at step 1 to 1 at ``warmup_steps``, then down to ``end_factor``.

    A complete schedule (Smith & Topin 2018), equal to torch's ``OneCycleLR``.
    """
    return _cycle(step, warmup_steps, total_steps, start_factor, 1.0, end_factor)


def one_cycle_momentum(
    step: int, warmup_steps: int, total_steps: int, low: float = 0.85, high: float = 0.95
) -> float:
    """Return the momentum for :func:`one_cycle`: ``high`` at both ends, ``low`` where the rate is highest."""
    return _cycle(step, warmup_steps, total_steps, high, low, high)


def _progress(step: int, warmup_steps: int, total_steps: int) -> float:
    return min(max(step - 1 - warmup_steps, 0) / (total_steps - warmup_steps), 1.0)


def _anneal(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _cycle(step: int, warmup_steps: int, total_steps: int, start: float, peak: float, end: float) -> float:
    if step < warmup_steps:
        return _anneal(start, peak, (step - 1) / (warmup_steps - 1))
    return _anneal(peak, end, min((step - warmup_steps) / (total_steps - warmup_steps), 1.0))


COOLDOWNS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
    "cosine": lambda progress: _anneal(1.0, 0.0, progress),
}
"""The cooldowns of :func:`wsd_decay` by the names of their shapes, over a progress from 0 to 1."""

WARMUPS: Mapping[str, Callable[[int, int, float], float]] = {
    "constant": constant_warmup,
    "linear": linear_warmup,
    "exponential": exponential_warmup,
    "cosine": cosine_warmup,
}
"""The warmups by the names of their shapes."""
