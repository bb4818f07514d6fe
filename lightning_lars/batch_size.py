"""Deprecated path of :mod:`lightning_lars.trainer.batch_size`; goes in the release after the next."""

import warnings

from lightning_lars.trainer.batch_size import (
    SCALING_RULES,
    ScalingRule,
    accumulated_batches,
    check_batch_size,
    data_parallel_replicas,
    effective_batch_size,
    per_device_batch_size,
    scale_adam,
    scaling_exponent,
    scaling_factor,
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
    "lightning_lars.batch_size is deprecated: import effective_batch_size from lightning_lars, and the rest "
    "from lightning_lars.trainer.batch_size",
    DeprecationWarning,
    stacklevel=2,
)
