"""The data of a run that has just ended, from the state of its objects."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning_lars.run_report.run import Group, Points, Run


def layers_of(history: Mapping[str, Any]) -> dict[str, dict[str, Points]]:
    """Return the values of every layer by quantity, from the state of a ``TrustRatioHistory``."""
    steps = history["steps"]
    return {
        quantity: {
            name: {step: value for step, value in zip(steps, values, strict=True) if not math.isnan(value)}
            for name, values in of.items()
        }
        for quantity, of in history["series"].items()
        if of
    }


def groups_of(
    optimizers: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], sizes: Mapping[str, int]
) -> tuple[Group, ...]:
    """Return the parameter groups.

    Args:
        optimizers: Name and ``param_groups`` of each, or of its state dict.
        sizes: Elements of parameters by name.
    """
    groups = []
    for optimizer, param_groups in optimizers:
        for number, group in enumerate(param_groups, 1):
            known = [sizes[name] for name in group.get("param_names", ()) if name in sizes]
            adapted = group.get("layer_adaptation")
            groups.append(
                Group(
                    optimizer=optimizer,
                    name=str(group.get("name", f"pg{number}")),
                    tensors=str(len(group["params"])),
                    elements=f"{sum(known):,}" if len(known) == len(group["params"]) else "-",
                    lr=_text(group.get("initial_lr", group.get("lr"))),
                    weight_decay=_text(group.get("weight_decay")),
                    layer_adaptation="-" if adapted is None else "yes" if adapted else "no",
                )
            )
    return tuple(groups)


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def learning_rate_of(steps: Sequence[int], rates: Sequence[float]) -> dict[str, Points]:
    """Return the largest learning rate of any layer as a metric, where it is known."""
    known = {step: rate for step, rate in zip(steps, rates, strict=True) if math.isfinite(rate)}
    return {"lr-largest of any layer": known} if known else {}


def run_of_training(
    history: Mapping[str, Any],
    rates: Sequence[float],
    groups: tuple[Group, ...],
    settings: Mapping[str, Any],
    alerts: Sequence[str],
) -> Run:
    """Return the data of a run.

    Args:
        history: The state of its ``TrustRatioHistory``.
        rates: Its learning rate at each step of the history.
        groups: Its parameter groups.
        settings: Hyperparameters and versions.
        alerts: Warnings that were given during training.
    """
    return Run(
        metrics=learning_rate_of(history["steps"], rates),
        layers=layers_of(history),
        groups=groups,
        settings={str(name): str(value) for name, value in settings.items()},
        alerts=tuple(alerts),
    )


def _text(value: Any) -> str:
    return "-" if value is None else f"{float(value):.4g}"
