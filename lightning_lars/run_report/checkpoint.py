"""Reads a checkpoint of Lightning."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch

from lightning_lars.run_report.run import Group, Points, Run
from lightning_lars.run_report.training import groups_of, layers_of


def read_checkpoint(path: Path, *, weights_only: bool = True) -> Run:
    """Read groups, hyperparameters and versions, and the history that a ``TrustRatioMonitor`` keeps.

    It keeps one if it has a ``picture``, a ``table`` or a ``report``.

    Args:
        path: The checkpoint, in one file.
        weights_only: As in :func:`torch.load`: False runs code that is in the checkpoint.

    Raises:
        ValueError: If ``weights_only`` does not allow a class in it, torch cannot read it, or it is not a
            checkpoint of Lightning.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except OSError:
        raise
    except Exception as error:  # of many classes, for a file that is empty, cut off, or something else
        if weights_only and isinstance(error, UnpicklingError) and is_zipfile(path):
            raise ValueError(
                f"{path} holds objects that are only read with weights_only=False: if you trust the file, "
                f"pass --no-weights-only. {error}"
            ) from error
        raise ValueError(
            f"{path} must be a metrics.csv or a checkpoint of Lightning, got a file that torch.load cannot "
            f"read, with {type(error).__name__}: {error}"
        ) from error
    if not isinstance(checkpoint, Mapping) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(f"{path} must be a checkpoint of Lightning, got one without its version")
    settings = {
        **{str(name): str(value) for name, value in dict(checkpoint.get("hyper_parameters") or {}).items()},
        "epoch": str(checkpoint.get("epoch")),
        "optimizer steps": str(checkpoint.get("global_step")),
        "Lightning": str(checkpoint["pytorch-lightning_version"]),
    }
    return Run(layers=_layers(checkpoint), groups=_groups(checkpoint), settings=settings)


def _layers(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Points]]:
    for state in (checkpoint.get("callbacks") or {}).values():
        history = state.get("history") if isinstance(state, Mapping) else None
        # By its keys: the monitor may be of a subclass, and another callback may have a history too.
        if isinstance(history, Mapping) and {"steps", "series", "seen", "every"} <= history.keys():
            return layers_of(history)
    return {}


def _groups(checkpoint: Mapping[str, Any]) -> tuple[Group, ...]:
    # A module's extra state is of any type.
    state_dict = checkpoint.get("state_dict", {})
    sizes = {name: weight.numel() for name, weight in state_dict.items() if isinstance(weight, torch.Tensor)}
    states = checkpoint.get("optimizer_states") or []
    # The class of an optimizer is not in its state.
    names = [str(number) for number in range(len(states))] if len(states) > 1 else [""]
    groups = [state.get("param_groups", ()) for state in states]
    return groups_of(list(zip(names, groups, strict=False)), sizes)
