"""Steps, samples and learning rates at larger batch sizes."""

import math

from lightning_lars.advice.parts import BatchSize, StartingPoint
from lightning_lars.learning_rate.batch_scaling import ScalingRule, scaling_factor
from lightning_lars.recipes import Recipe, lamb, lars

LINEAR = ("SGD", "LARS")
"""Class names of optimizers with a published linear rule (Goyal et al. 2017, Chen et al. 2020)."""


def steps_factor(batch_size: float, base_batch_size: float, critical: float) -> float:
    """Return the ratio of the steps to the same loss at two batch sizes.

    ::

        steps   = fewest steps   * (1 + critical / batch size)
        samples = fewest samples * (1 + batch size / critical)

    McCandlish et al. 2018, arXiv:1812.06162, with the noise scale as the critical batch size.

    Args:
        batch_size: Effective batch size, in samples, above 0.
        base_batch_size: The batch size to compare with, above 0.
        critical: The critical batch size, in samples, above 0.

    Returns:
        Steps at ``batch_size`` divided by steps at ``base_batch_size``.

    Example:
        >>> from lightning_lars.advice.batch_sizes import steps_factor
        >>> steps_factor(400, 100, critical=200)
        0.5
    """
    return (1 + critical / batch_size) / (1 + critical / base_batch_size)


def suggested_multiple(batch_size: int, critical: float) -> int:
    """Return the power of 2 by which a batch size is closest to the critical one, at least 1.

    Example:
        >>> from lightning_lars.advice.batch_sizes import suggested_multiple
        >>> suggested_multiple(128, critical=700.0), suggested_multiple(128, critical=9.0)
        (4, 1)
    """
    return int(2 ** max(0, round(math.log2(critical / batch_size))))


def batch_sizes(
    batch_size: int,
    base_batch_size: int,
    lr: float | None,
    steps: int | None,
    critical: float | None,
    *,
    is_linear: bool,
) -> tuple[BatchSize, ...]:
    """Return what to expect of multiples of a batch size, up to twice the suggested one, at least 16 times.

    Args:
        batch_size: The batch size of the module's own run.
        base_batch_size: The batch size that ``lr`` is for.
        lr: The module's own learning rate, None if it has none.
        steps: Steps of its run, if known.
        critical: The critical batch size, if known.
        is_linear: Whether the linear rule applies.
    """
    suggested = 1 if critical is None else suggested_multiple(batch_size, critical)
    last = max(16, 2 * suggested)
    rows = []
    for exponent in range(int(math.log2(last)) + 1):
        size = batch_size * 2**exponent
        factor = None if critical is None else steps_factor(size, batch_size, critical)
        expected = None if factor is None or steps is None else max(1, round(steps * factor))
        rows.append(
            BatchSize(
                batch_size=size,
                steps_factor=factor,
                samples_factor=None if factor is None else factor * 2**exponent,
                steps=expected,
                samples=None if expected is None else expected * size,
                lr_sqrt=_scaled(lr, size, base_batch_size, "sqrt"),
                lr_linear=_scaled(lr, size, base_batch_size, "linear") if is_linear else None,
                lars=_starting_point(lars(size)),
                lamb=_starting_point(lamb(size)),
            )
        )
    return tuple(rows)


def _scaled(lr: float | None, size: int, base_batch_size: int, rule: ScalingRule) -> float | None:
    return None if lr is None else lr * scaling_factor(size, base_batch_size, rule)


def _starting_point(recipe: Recipe) -> StartingPoint:
    arguments = recipe["optimizer"].keywords
    excluded_lr = recipe["excluded_lr"]
    assert excluded_lr is not None
    return StartingPoint(arguments["lr"], excluded_lr, arguments["weight_decay"])
