"""The type of a recipe, and functions that build one."""

from functools import partial
from typing import Any, TypedDict, TypeVar

from lightning_lars.learning_rate.batch_scaling import check_batch_size
from lightning_lars.learning_rate.warmup_decay import WarmupDecayLR
from lightning_lars.rules import POSITIVE_WHOLE, require


class Recipe(TypedDict):
    """Keyword arguments of :class:`~lightning_lars.mixin.LargeBatchMixin`."""

    optimizer: partial[Any]
    lr_scheduler: partial[WarmupDecayLR]
    exclude_norm: bool
    exclude_bias: bool
    exclude_gain: bool
    excluded_lr: float | None
    excluded_lr_scale: float
    layer_decay: float | None


def recipe(
    optimizer: partial[Any],
    warmup_steps: int,
    *,
    excludes: bool = True,
    excluded_lr: float | None = None,
    excluded_lr_scale: float = 1.0,
    layer_decay: float | None = None,
    **schedule: Any,
) -> Recipe:
    """Return a recipe.

    Args:
        optimizer: The optimizer, without parameters.
        warmup_steps: Optimizer steps of warmup.
        excludes: Whether norms, biases and gains are excluded.
        excluded_lr: The learning rate of excluded parameters; None keeps the optimizer's.
        excluded_lr_scale: The factor on the learning rate of excluded parameters.
        layer_decay: The factor from the learning rate of each block to that of the block before it.
        **schedule: Arguments of :class:`~lightning_lars.WarmupDecayLR`.
    """
    return Recipe(
        optimizer=optimizer,
        lr_scheduler=partial(WarmupDecayLR, warmup_steps=warmup_steps, **schedule),
        exclude_norm=excludes,
        exclude_bias=excludes,
        exclude_gain=excludes,
        excluded_lr=excluded_lr,
        excluded_lr_scale=excluded_lr_scale,
        layer_decay=layer_decay,
    )


def linear_rule(lr: float, batch_size: int) -> float:
    """Return the learning rate for a batch size by the linear rule, from that at batch 256.

    Raises:
        ValueError: If ``batch_size`` is not an integer above 0.
    """
    return lr * check_batch_size("batch_size", batch_size) / 256


def steps_of(epochs: int, steps_per_epoch: int) -> int:
    """Return the optimizer steps of some epochs, or raise ValueError unless an epoch has an integer."""
    return epochs * POSITIVE_WHOLE.checked_int("steps_per_epoch", steps_per_epoch)


_Key = TypeVar("_Key", int, str)
_Row = TypeVar("_Row")


def row_of(argument: str, value: _Key, rows: dict[_Key, _Row]) -> _Row:
    """Return the row of a table, or raise ValueError if there is none for this value of the argument."""
    require(argument, f"one of {tuple(rows)}, for which the source has numbers", value, value in rows)
    return rows[value]
