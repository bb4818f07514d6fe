"""Rules that scale the learning rate with the batch size."""

import math
from typing import Literal

from lightning_lars.rules import POSITIVE_WHOLE

ScalingRule = Literal["linear", "sqrt", "adam_sqrt", "none"]
SCALING_RULES = ("linear", "sqrt", "adam_sqrt", "none")


def scaling_factor(batch_size: float, base_batch_size: float, rule: ScalingRule | float) -> float:
    """Return the factor on a learning rate that was tuned at ``base_batch_size``.

    ::

        linear            batch_size / base_batch_size                  Goyal et al. 2017
        sqrt, adam_sqrt   sqrt(batch_size / base_batch_size)            Krizhevsky 2014
        an exponent p     (batch_size / base_batch_size) ** p
        none              1

    Args:
        batch_size: Effective batch size, above 0.
        base_batch_size: Batch size at which the learning rate was tuned, above 0.
        rule: One of the names above, or the exponent.

    Raises:
        ValueError: If a batch size is not above 0, or the rule is unknown.

    Example:
        >>> from lightning_lars.learning_rate import scaling_factor
        >>> [scaling_factor(4096, 256, rule) for rule in ("linear", "sqrt", 0.25, "none")]
        [16.0, 4.0, 2.0, 1.0]
    """
    for name, value in {"batch_size": batch_size, "base_batch_size": base_batch_size}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value!r}")
    return float((batch_size / base_batch_size) ** scaling_exponent(rule))


def scaling_exponent(rule: ScalingRule | float) -> float:
    """Return the exponent of a rule: 1 for linear, 1/2 for the square roots, 0 for none.

    Raises:
        ValueError: If the rule is unknown.
    """
    exponents = {"linear": 1.0, "sqrt": 0.5, "adam_sqrt": 0.5, "none": 0.0}
    if isinstance(rule, int | float) and not isinstance(rule, bool) and math.isfinite(rule):
        return float(rule)
    if not isinstance(rule, str) or rule not in exponents:
        raise ValueError(f"rule must be one of {SCALING_RULES} or an exponent, got {rule!r}")
    return exponents[rule]


def scale_adam(betas: tuple[float, float], eps: float, ratio: float) -> tuple[tuple[float, float], float]:
    """Scale Adam's betas and eps for a larger batch, to go with the square root of the learning rate.

    ::

        beta' = 1 - ratio * (1 - beta)
        eps' = eps / sqrt(ratio)

    Malladi et al. 2022, arXiv:2205.10287: the square root scaling rule, for a batch ``ratio`` times as large.

    Args:
        betas: Adam's betas at the base batch size.
        eps: Adam's eps at the base batch size.
        ratio: Batch size over base batch size, above 0.

    Returns:
        The betas and eps for the new batch size.

    Raises:
        ValueError: If the ratio would make a beta negative.

    Example:
        >>> from lightning_lars.learning_rate import scale_adam
        >>> betas, eps = scale_adam((0.9, 0.999), 1e-8, ratio=4)
        >>> [round(beta, 6) for beta in betas], eps
        ([0.6, 0.996], 5e-09)
    """
    scaled = tuple(1 - ratio * (1 - beta) for beta in betas)
    if min(scaled) < 0:
        largest = min(1 / (1 - beta) for beta in betas)
        raise ValueError(
            f'rule="adam_sqrt" holds up to {largest:.4g} times the base batch size with betas={betas}, '
            f'got {ratio:.4g} times: use rule="sqrt" or a larger base batch size'
        )
    return (scaled[0], scaled[1]), eps / math.sqrt(ratio)


def check_batch_size(argument: str, value: object) -> int:
    """Return a batch size as an int, or raise ValueError unless it is an integer above 0."""
    return POSITIVE_WHOLE.checked_int(argument, value)
