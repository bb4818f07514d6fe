"""The learning rate: schedules, rules for batch-size scaling, and factors applied inside a step.

Depends on torch only; the folder `trainer` connects it to a Trainer.
"""

from lightning_lars.learning_rate.batch_growth import additive_growth, multiplicative_growth
from lightning_lars.learning_rate.batch_scaling import scale_adam, scaling_exponent, scaling_factor
from lightning_lars.learning_rate.curves import (
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
    wsd_decay,
)
from lightning_lars.learning_rate.warmup_decay import WarmupDecayLR

__all__ = [
    "WarmupDecayLR",
    "additive_growth",
    "constant_decay",
    "constant_warmup",
    "cosine_decay",
    "cosine_warmup",
    "exponential_warmup",
    "inverse_sqrt_decay",
    "linear_warmup",
    "multiplicative_growth",
    "one_cycle",
    "one_cycle_momentum",
    "polynomial_decay",
    "scale_adam",
    "scaling_exponent",
    "scaling_factor",
    "step_decay",
    "wsd_decay",
]
