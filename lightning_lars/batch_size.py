"""Deprecated alias of :mod:`lightning_lars.learning_rate` and :mod:`lightning_lars.trainer`.

The release after the next removes it.
"""

import warnings

from lightning_lars.learning_rate.batch_scaling import (
    SCALING_RULES,
    ScalingRule,
    check_batch_size,
    scale_adam,
    scaling_exponent,
    scaling_factor,
)
from lightning_lars.trainer.batch_size import (
    accumulated_batches,
    data_parallel_replicas,
    effective_batch_size,
    per_device_batch_size,
    takes_steps,
)

__all__ = [
    "SCALING_RULES",
    "ScalingRule",
    "accumulated_batches",
    "check_batch_size",
    "data_parallel_replicas",
    "effective_batch_size",
    "per_device_batch_size",
    "scale_adam",
    "scaling_exponent",
    "scaling_factor",
    "takes_steps",
]

warnings.warn(
    "lightning_lars.batch_size is deprecated: import effective_batch_size from lightning_lars, and the "
    "scaling rules from lightning_lars.learning_rate",
    DeprecationWarning,
    stacklevel=2,
)
