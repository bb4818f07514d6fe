"""LARS and LAMB for PyTorch Lightning: train with large batches, and see every layer's trust ratio."""

from lightning_lars.callbacks import TrustRatioMonitor
from lightning_lars.mixin import LargeBatchMixin
from lightning_lars.optim import LAMB, LARS
from lightning_lars.param_groups import (
    DEFAULT_EXCLUDED,
    build_optimizer,
    explain_param_groups,
    param_groups,
)

__all__ = [
    "DEFAULT_EXCLUDED",
    "LAMB",
    "LARS",
    "LargeBatchMixin",
    "TrustRatioMonitor",
    "build_optimizer",
    "explain_param_groups",
    "param_groups",
]
