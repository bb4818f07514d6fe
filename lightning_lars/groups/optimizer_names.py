"""Names of a run's optimizers, in the log and in messages."""

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from torch.optim import Optimizer

from lightning_lars.combined.combined_optimizer import parts_of

AnyOptimizer = TypeVar("AnyOptimizer")


def kinds(optimizers: Sequence[Optimizer]) -> list[str]:
    """Return the class names of the optimizers, without Lightning's placeholder for none.

    Of a combined optimizer, those of the optimizers in it.

    Example:
        >>> import torch
        >>> from lightning_lars.groups.optimizer_names import kinds
        >>> kinds([torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])])
        ['SGD']
    """
    return [type(optimizer).__name__ for optimizer in parts_of(optimizers) if optimizer.param_groups]


def by_name(optimizers: Sequence[AnyOptimizer]) -> dict[str, AnyOptimizer]:
    """Return the optimizers by the prefix of their keys in the log.

    Several optimizers of one class are numbered as in ``LearningRateMonitor``.

    Example:
        >>> from lightning_lars.groups.optimizer_names import by_name
        >>> by_name([1, 2, 3.0])
        {'int/': 1, 'int-1/': 2, 'float/': 3.0}
        >>> by_name([1])
        {'': 1}
    """
    if len(optimizers) == 1:
        return {"": optimizers[0]}
    seen: Counter[str] = Counter()
    named = {}
    for optimizer in optimizers:
        name = type(optimizer).__name__
        number = f"-{seen[name]}" if seen[name] else ""
        named[f"{name}{number}/"] = optimizer
        seen[name] += 1
    return named
