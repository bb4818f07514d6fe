"""LARS and LAMB for PyTorch Lightning: train with large batches, and see every layer's trust ratio."""

import importlib.metadata

from lightning_lars.callbacks import (
    BatchSizeScaling,
    ExcludeNormAndBias,
    GradientNoiseScale,
    LearningRateWarmup,
    ParamGroupSummary,
    PercentileGradientClipping,
    PreciseBatchNorm,
    TrustRatioMonitor,
)
from lightning_lars.groups.introspection import DEFAULT_EXCLUDED
from lightning_lars.groups.param_groups import build_optimizer, explain_param_groups, param_groups
from lightning_lars.learning_rate.warmup_decay import WarmupDecayLR
from lightning_lars.mixin import LargeBatchMixin
from lightning_lars.optim import LAMB, LARS, LAMB8bit, LARS8bit
from lightning_lars.trainer.batch_size import effective_batch_size

try:
    __version__ = importlib.metadata.version("lightning-lars")
except importlib.metadata.PackageNotFoundError:  # a tree that was copied, not installed
    __version__ = "0+unknown"

__all__ = [
    "DEFAULT_EXCLUDED",
    "LAMB",
    "LARS",
    "BatchSizeScaling",
    "ExcludeNormAndBias",
    "GradientNoiseScale",
    "LAMB8bit",
    "LARS8bit",
    "LargeBatchMixin",
    "LearningRateWarmup",
    "ParamGroupSummary",
    "PercentileGradientClipping",
    "PreciseBatchNorm",
    "TrustRatioMonitor",
    "WarmupDecayLR",
    "build_optimizer",
    "effective_batch_size",
    "explain_param_groups",
    "param_groups",
]
