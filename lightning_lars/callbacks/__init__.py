"""The callbacks that are registered on a Trainer, one file each, and the checks and outputs of the monitor.

They do not depend on each other: shared code is in `trainer`, or in the folder of its topic.
"""

from lightning_lars.callbacks.batch_size_scaling import BatchSizeScaling
from lightning_lars.callbacks.batch_size_schedule import BatchSizeSchedule
from lightning_lars.callbacks.exclude_norm_and_bias import ExcludeNormAndBias
from lightning_lars.callbacks.gradient_noise_scale import GradientNoiseScale
from lightning_lars.callbacks.learning_rate_warmup import LearningRateWarmup
from lightning_lars.callbacks.param_group_summary import ParamGroupSummary
from lightning_lars.callbacks.percentile_gradient_clipping import PercentileGradientClipping
from lightning_lars.callbacks.precise_batch_norm import PreciseBatchNorm
from lightning_lars.callbacks.trust_ratio_monitor import TrustRatioMonitor

__all__ = [
    "BatchSizeScaling",
    "BatchSizeSchedule",
    "ExcludeNormAndBias",
    "GradientNoiseScale",
    "LearningRateWarmup",
    "ParamGroupSummary",
    "PercentileGradientClipping",
    "PreciseBatchNorm",
    "TrustRatioMonitor",
]
