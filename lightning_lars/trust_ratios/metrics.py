"""Metrics of trust ratios for loggers: keys, values and histograms."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from statistics import median
from typing import Any

import torch

from lightning_lars.class_names import has_class_named
from lightning_lars.trust_ratios.layer_statistics import OverSteps
from lightning_lars.trust_ratios.protocols import FLAGS

Quantities = Mapping[str, Mapping[str, OverSteps]]
"""Statistics from ``StepStatistics.flush``, by quantity and layer."""

_QUANTITIES = ("trust_ratio", "effective_lr", "update_to_weight", "gradient_norm")


def summary_metrics(quantities: Quantities, optimizer: str) -> dict[str, float]:
    """Return minimum, median and maximum of each quantity over layers, and fractions of layers.

    Args:
        quantities: Statistics of the layers of one optimizer.
        optimizer: Prefix of the last component of its keys, ``""`` or ``"LARS-1/"``.

    Example:
        >>> from lightning_lars.trust_ratios.layer_statistics import OverSteps
        >>> from lightning_lars.trust_ratios.metrics import summary_metrics
        >>> ratios = {"conv.weight": OverSteps(0.5, 0.25, 1.0), "fc.weight": OverSteps(0.75, 0.5, 2.0)}
        >>> summary_metrics({"trust_ratio": ratios}, "")
        {'trust_ratio/min': 0.25, 'trust_ratio/median': 0.625, 'trust_ratio/max': 2.0}
    """
    summary = {}
    for quantity in _QUANTITIES:
        layers = quantities.get(quantity, {}).values()
        if layers:
            # Propagate nan: min and max would order it arbitrarily.
            nan_or_zero = math.nan if any(math.isnan(layer.mean) for layer in layers) else 0.0
            summary[f"{quantity}/{optimizer}min"] = nan_or_zero + min(layer.minimum for layer in layers)
            summary[f"{quantity}/{optimizer}median"] = nan_or_zero + median(layer.mean for layer in layers)
            summary[f"{quantity}/{optimizer}max"] = nan_or_zero + max(layer.maximum for layer in layers)
    for share in FLAGS:
        layers = quantities.get(share, {}).values()
        if layers:
            summary[f"trust_ratio/{optimizer}{share}"] = sum(layer.mean for layer in layers) / len(layers)
    return summary


def per_layer_metrics(quantities: Quantities, optimizer: str, patterns: Sequence[str]) -> dict[str, float]:
    """Return the mean of each quantity for layers whose names match a pattern."""
    return {
        f"{quantity}_per_layer/{optimizer}{layer}": over_steps.mean
        for quantity in _QUANTITIES
        for layer, over_steps in quantities.get(quantity, {}).items()
        if any(fnmatchcase(layer, pattern) for pattern in patterns)
    }


def log_histograms(logger: Any, quantities: Quantities, optimizer: str, step: int) -> None:
    """Log one histogram over layers of each quantity, if the logger supports histograms."""
    for quantity in _QUANTITIES:
        values = [layer.mean for layer in quantities.get(quantity, {}).values() if math.isfinite(layer.mean)]
        if not values:
            continue
        key = f"{quantity}_per_layer/{optimizer}all"
        if has_class_named(logger, "TensorBoardLogger"):
            # Its log_metrics, which adds the prefix, accepts only numbers, and the prefix has no public name.
            prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
            logger.experiment.add_histogram(f"{prefix}{key}", torch.tensor(values, device="cpu"), step)
        elif has_class_named(logger, "WandbLogger"):
            from wandb import Histogram

            logger.log_metrics({key: Histogram(values)}, step=step)
