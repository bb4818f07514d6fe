"""The door for those who subclass: a LightningModule's ``configure_optimizers``."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lars.groups.excluded_rate import check_excluded_rate, keep_excluded_rate
from lightning_lars.groups.introspection import check_switches
from lightning_lars.groups.param_groups import build_optimizer
from lightning_lars.optim import LARS
from lightning_lars.rules import require
from lightning_lars.trainer.safe_globals import LoadFromCheckpoint, trust_globals_of
from lightning_lars.trainer.strategy_checks import check_strategy
from lightning_lars.trainer.training_length import scheduler_config

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
"""Builds an optimizer from parameter groups: ``LARS``, or ``functools.partial(LARS, lr=3.2)``."""

LRSchedulerCallable = Callable[[Optimizer], LRScheduler]
"""Builds a scheduler on an optimizer: ``functools.partial(WarmupDecayLR, warmup_steps=500)``."""


class LargeBatchMixin:
    """Gives a LightningModule a ``configure_optimizers`` that knows its norms and biases.

    Stands before ``LightningModule`` in the bases. The optimizer is built over
    :func:`~lightning_lars.param_groups` of the module, after ``configure_model``. Works without
    a Trainer too, under Fabric or in a loop of its own, where a schedule has to be given its length.

    The rate is in ``optimizer``: ``Tuner.lr_find`` finds no attribute to write it to, and needs
    ``update_attr=False``.

    Args:
        *args: Handed on to the next class.
        optimizer: Takes the parameter groups and returns the optimizer: ``LARS`` (which None stands for),
            ``LAMB``, any ``torch.optim`` class, or one with arguments, as
            ``functools.partial(LARS, lr=3.2)``.
        lr_scheduler: Takes the optimizer and returns a scheduler. A
            :class:`~lightning_lars.WarmupDecayLR` without ``total_steps`` gets those of the
            training, accumulation, ``max_steps`` and all.
        lr_scheduler_interval: When the scheduler steps. None stands for every optimizer step with
            ``WarmupDecayLR``, else every epoch.
        exclude: fnmatch patterns over parameter names, to be excluded beside norms, biases and gains. For
            module types and predicates, write a ``configure_optimizers`` that calls
            :func:`~lightning_lars.build_optimizer`.
        exclude_bias: Whether biases are excluded.
        exclude_norm: Whether normalization layers are excluded (apex LARC adapts them, as SwAV does).
        exclude_gain: Whether gains are excluded, and what is broadcast over the batch, as tokens are.
        excluded_lr: Learning rate of what is excluded, above 0, whatever that of ``optimizer`` is.
            Schedules and warmup act on it, ``BatchSizeScaling`` does not. None leaves the rate of the rest.
        excluded_lr_scale: The same as a factor, above 0, on the rate of the rest. Not together with
            ``excluded_lr``.
        **kwargs: Handed on to the next class.

    Raises:
        TypeError: If ``optimizer`` cannot be called; when subclassing, if the bases are in an order in
            which ``LightningModule`` would hide the mixin.

    Example:
        >>> from functools import partial
        >>> import lightning
        >>> from torch import nn
        >>> from lightning_lars import LARS, LargeBatchMixin
        >>> class Classifier(LargeBatchMixin, lightning.LightningModule):
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
        >>> optimizer = Classifier(optimizer=partial(LARS, lr=3.2)).configure_optimizers()
        >>> for group in optimizer.param_groups:
        ...     print(group["name"], group["lr"], group["param_names"])
        adapted 3.2 ['net.0.weight']
        excluded 3.2 ['net.0.bias', 'net.1.weight', 'net.1.bias']

        All arguments at once, from the batch size, as :func:`lightning_lars.recipes.lars` starts:

        >>> from lightning_lars import recipes
        >>> model = Classifier(**recipes.lars(batch_size=2048))
    """

    def __init__(
        self,
        *args: Any,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] | None = None,
        exclude: Sequence[str] = (),
        exclude_bias: bool = True,
        exclude_norm: bool = True,
        exclude_gain: bool = True,
        excluded_lr: float | None = None,
        excluded_lr_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if optimizer is None:
            optimizer = LARS
        if isinstance(optimizer, Optimizer) or not callable(optimizer):
            raise TypeError(
                "optimizer must be an optimizer class or a callable that takes parameter groups, such as "
                f"functools.partial(LARS, lr=3.2), got {optimizer!r}"
            )
        if lr_scheduler is not None and not callable(lr_scheduler):
            raise TypeError(
                "lr_scheduler must be a scheduler class or a callable that takes the optimizer, such as "
                f"functools.partial(WarmupDecayLR, warmup_steps=500), got {lr_scheduler!r}"
            )
        if lr_scheduler is None and lr_scheduler_interval is not None:
            raise ValueError(
                f"lr_scheduler_interval must be None without an lr_scheduler, got {lr_scheduler_interval!r}"
            )
        self._build_optimizer = optimizer
        self._build_lr_scheduler = lr_scheduler
        self._lr_scheduler_interval = lr_scheduler_interval
        check_excluded_rate(excluded_lr, excluded_lr_scale)
        require("exclude", "patterns over parameter names", exclude, isinstance(exclude, Sequence))
        check_switches(exclude_norm=exclude_norm, exclude_bias=exclude_bias, exclude_gain=exclude_gain)
        self._exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self._exclude_norm = exclude_norm
        self._exclude_bias = exclude_bias
        self._exclude_gain = exclude_gain
        self._excluded_lr = excluded_lr
        self._excluded_lr_scale = excluded_lr_scale
        self._trust_what_was_given()

    def _trust_what_was_given(self) -> None:
        """Let ``ckpt_path`` of the Trainer load what saved hyperparameters of this module name."""
        trust_globals_of(self._build_optimizer, self._build_lr_scheduler)

    load_from_checkpoint = LoadFromCheckpoint(_trust_what_was_given)

    def __setstate__(self, state: dict[str, Any]) -> None:
        cast(Any, super()).__setstate__(state)
        self._trust_what_was_given()  # in the process that a strategy has sent the module to

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(LargeBatchMixin)]
        # By name, as lightning.pytorch and pytorch_lightning have a LightningModule each.
        if any(base.__name__ == "LightningModule" for base in before):
            raise TypeError(
                f"{cls.__name__} must have LargeBatchMixin before LightningModule in its bases, got "
                f"({', '.join(base.__name__ for base in cls.__bases__)}): "
                "LightningModule would hide configure_optimizers of the mixin"
            )

    def configure_optimizers(self) -> Any:
        """Build the optimizer over the module's adapted and excluded layers, and its scheduler.

        Returns:
            The optimizer, or what Lightning takes for one with a scheduler.

        Raises:
            ValueError: If no parameter is trainable, an argument breaks its rule, or the scheduler leaves
                what is excluded no rate of its own.
            TypeError: If what ``optimizer`` returns is no optimizer.
            MisconfigurationException: If the strategy hides the layers from LARS or LAMB (DeepSpeed ZeRO).
        """
        assert isinstance(self, nn.Module)
        optimizer = build_optimizer(
            self,
            self._build_optimizer,
            exclude=self._exclude,
            exclude_norm=self._exclude_norm,
            exclude_bias=self._exclude_bias,
            exclude_gain=self._exclude_gain,
            excluded_lr=self._excluded_lr,
            excluded_lr_scale=self._excluded_lr_scale,
        )
        check_strategy(cast(LightningModule, self), optimizer)
        if self._build_lr_scheduler is None:
            return optimizer
        scheduler = self._build_lr_scheduler(optimizer)
        if not hasattr(scheduler, "optimizer"):
            raise TypeError(
                f"lr_scheduler must return a scheduler, got {scheduler!r} from {self._build_lr_scheduler!r}"
            )
        keep_excluded_rate(
            scheduler,
            optimizer.param_groups,
            self._excluded_lr,
            self._excluded_lr_scale,
        )
        config = scheduler_config(cast(LightningModule, self), scheduler, self._lr_scheduler_interval)
        return {"optimizer": optimizer, "lr_scheduler": config}
