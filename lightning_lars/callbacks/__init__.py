"""What is registered on a Trainer."""

from lightning_lars.callbacks.trust_ratio_monitor import TrustRatioMonitor

__all__ = ["TrustRatioMonitor"]
