"""Reads a checkpoint of Lightning."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lightning_lars.run_report.run import Group, Run


def read_checkpoint(path: Path, *, weights_only: bool = True) -> Run:
    """Read groups, hyperparameters and versions, and the history that a ``TrustRatioMonitor`` keeps.

    It keeps one if it has a ``picture`` or a ``table``.

    Args:
        path: The checkpoint, in one file.
        weights_only: As in :func:`torch.load`: False runs code that the checkpoint names.

    Raises:
        ValueError: If ``weights_only`` does not allow a class in the checkpoint, or it is none of Lightning.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except UnpicklingError as error:
        if not weights_only:
            raise
        raise ValueError(
            f"{path} holds objects that are only read with weights_only=False: if you trust the file, pass "
            f"--no-weights-only. {error}"
        ) from error
    if not isinstance(checkpoint, Mapping) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(f"{path} must be a checkpoint of Lightning, got one without its version")
    settings = {
        **{name: str(value) for name, value in (checkpoint.get("hyper_parameters") or {}).items()},
        "epoch": str(checkpoint.get("epoch")),
        "optimizer steps": str(checkpoint.get("global_step")),
        "Lightning": str(checkpoint["pytorch-lightning_version"]),
    }
    return Run(layers=_layers(checkpoint), groups=tuple(_groups(checkpoint)), settings=settings)


def _layers(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    for state in (checkpoint.get("callbacks") or {}).values():
        history = state.get("history") if isinstance(state, Mapping) else None
        if isinstance(history, Mapping) and "series" in history:
            return {
                quantity: {
                    name: {
                        step: value
                        for step, value in zip(history["steps"], values, strict=True)
                        if not math.isnan(value)
                    }
                    for name, values in of.items()
                }
                for quantity, of in history["series"].items()
                if of
            }
    return {}


def _groups(checkpoint: Mapping[str, Any]) -> Iterator[Group]:
    weights = checkpoint.get("state_dict", {})
    states = checkpoint.get("optimizer_states") or []
    for number, state in enumerate(states):
        for index, group in enumerate(state.get("param_groups", ())):
            sizes = [weights[name].numel() for name in group.get("param_names", ()) if name in weights]
            adapted = group.get("layer_adaptation")
            yield Group(
                optimizer=str(number) if len(states) > 1 else "",
                name=str(group.get("name", f"pg{index + 1}")),
                tensors=str(len(group["params"])),
                elements=f"{sum(sizes):,}" if len(sizes) == len(group["params"]) else "-",
                lr=_text(group.get("initial_lr", group.get("lr"))),
                weight_decay=_text(group.get("weight_decay")),
                layer_adaptation="-" if adapted is None else "yes" if adapted else "no",
            )


def _text(value: Any) -> str:
    return "-" if value is None else f"{float(value):.4g}"
