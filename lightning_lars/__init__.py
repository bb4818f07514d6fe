"""LARS and LAMB for PyTorch Lightning: train with large batches, and see every layer's trust ratio."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_lars.advice.advise import advise
    from lightning_lars.callbacks import (
        BatchSizeScaling,
        BatchSizeSchedule,
        ExcludeNormAndBias,
        GradientNoiseScale,
        LearningRateWarmup,
        ParamGroupSummary,
        PercentileGradientClipping,
        PreciseBatchNorm,
        TrustRatioMonitor,
    )
    from lightning_lars.combined.combined_optimizer import CombinedOptimizer
    from lightning_lars.groups.build import build_optimizer
    from lightning_lars.groups.explanation import explain_param_groups
    from lightning_lars.groups.introspection import DEFAULT_EXCLUDED
    from lightning_lars.groups.param_groups import param_groups
    from lightning_lars.learning_rate import WarmupDecayLR
    from lightning_lars.mixin import LargeBatchMixin
    from lightning_lars.optim import LAMB, LARS, LAMB8bit, LARS8bit, NovoGrad
    from lightning_lars.trainer.batch_size import effective_batch_size

__all__ = [
    "DEFAULT_EXCLUDED",
    "LAMB",
    "LARS",
    "BatchSizeScaling",
    "BatchSizeSchedule",
    "CombinedOptimizer",
    "ExcludeNormAndBias",
    "GradientNoiseScale",
    "LAMB8bit",
    "LARS8bit",
    "LargeBatchMixin",
    "LearningRateWarmup",
    "NovoGrad",
    "ParamGroupSummary",
    "PercentileGradientClipping",
    "PreciseBatchNorm",
    "TrustRatioMonitor",
    "WarmupDecayLR",
    "advise",
    "build_optimizer",
    "effective_batch_size",
    "explain_param_groups",
    "param_groups",
]

# Imported when first asked for: optimizers and groups need torch alone, and Lightning takes seconds.
_MODULES = {
    "lightning_lars.advice.advise": ("advise",),
    "lightning_lars.callbacks": (
        "BatchSizeScaling",
        "BatchSizeSchedule",
        "ExcludeNormAndBias",
        "GradientNoiseScale",
        "LearningRateWarmup",
        "ParamGroupSummary",
        "PercentileGradientClipping",
        "PreciseBatchNorm",
        "TrustRatioMonitor",
    ),
    "lightning_lars.combined.combined_optimizer": ("CombinedOptimizer",),
    "lightning_lars.groups.introspection": ("DEFAULT_EXCLUDED",),
    "lightning_lars.groups.build": ("build_optimizer",),
    "lightning_lars.groups.explanation": ("explain_param_groups",),
    "lightning_lars.groups.param_groups": ("param_groups",),
    "lightning_lars.learning_rate": ("WarmupDecayLR",),
    "lightning_lars.mixin": ("LargeBatchMixin",),
    "lightning_lars.optim": ("LAMB", "LARS", "LAMB8bit", "LARS8bit", "NovoGrad"),
    "lightning_lars.trainer.batch_size": ("effective_batch_size",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_SUBMODULES = ("callbacks", "groups", "learning_rate", "mixin", "optim")


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    elif name in _SUBMODULES:
        value = import_module(f"lightning_lars.{name}")
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lightning-lars")
    except PackageNotFoundError:  # a tree that was copied, not installed
        return "0+unknown"
