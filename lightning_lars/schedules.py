"""Deprecated alias of :mod:`lightning_lars.learning_rate`; the release after the next removes it."""

import warnings

from lightning_lars.learning_rate import (
    WarmupDecayLR,
    constant_decay,
    constant_warmup,
    cosine_decay,
    cosine_warmup,
    exponential_warmup,
    inverse_sqrt_decay,
    linear_warmup,
    one_cycle,
    one_cycle_momentum,
    polynomial_decay,
    step_decay,
)

__all__ = [
    "WarmupDecayLR",
    "constant_decay",
    "constant_warmup",
    "cosine_decay",
    "cosine_warmup",
    "exponential_warmup",
    "inverse_sqrt_decay",
    "linear_warmup",
    "one_cycle",
    "one_cycle_momentum",
    "polynomial_decay",
    "step_decay",
]

warnings.warn(
    "lightning_lars.schedules is deprecated: import from lightning_lars.learning_rate",
    DeprecationWarning,
    stacklevel=2,
)
