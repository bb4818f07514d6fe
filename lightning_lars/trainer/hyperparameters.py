"""Converts optimizers and schedulers in saved hyperparameters to values that loggers can store."""

from collections.abc import Mapping, MutableMapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def as_logged(hyperparameters: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace partials, and classes of optimizers and schedulers, by ``class_path`` and ``init_args``.

    That is what ``LightningCLI`` saves for the same arguments, so that a logger can compare the learning
    rates of runs from either. Of a partial, Weights & Biases would store nothing, the others its ``repr``.
    Tensors, which TensorBoard would refuse, become numbers.

    Args:
        hyperparameters: Hyperparameters by name; changed in place.

    Returns:
        The same mapping.

    Example:
        >>> from functools import partial
        >>> from lightning_lars import LARS
        >>> from lightning_lars.trainer.hyperparameters import as_logged
        >>> as_logged({"width": 8, "optimizer": partial(LARS, lr=3.2)})["optimizer"]
        {'class_path': 'lightning_lars.optim.lars.LARS', 'init_args': {'lr': 3.2}}
    """
    for name, value in hyperparameters.items():
        is_class = isinstance(value, type) and issubclass(value, Optimizer | LRScheduler)
        if is_class or (isinstance(value, partial) and hasattr(value.func, "__qualname__")):
            hyperparameters[name] = _described(value)
    return hyperparameters


def _described(value: Any) -> dict[str, Any]:
    built = value.func if isinstance(value, partial) else value
    described: dict[str, Any] = {"class_path": f"{built.__module__}.{built.__qualname__}"}
    if isinstance(value, partial):
        if value.args:
            described["args"] = _plain(value.args)
        described["init_args"] = _plain(value.keywords)
    return described


def _plain(value: Any) -> Any:
    """Return what every logger and YAML can store: numbers, strings, lists and dicts."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
