"""A mixin that gives a LightningModule its ``configure_optimizers``."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lars.groups.build import build_optimizer, check_matrix_optimizer, check_optimizer
from lightning_lars.groups.excluded_rate import check_excluded_rate
from lightning_lars.groups.introspection import check_switches
from lightning_lars.groups.layer_depth import LayerDepth, check_layer_decay
from lightning_lars.groups.matrices import Matrices
from lightning_lars.groups.scheduled_rates import keep_group_rates, matrix_rates
from lightning_lars.optim import LARS
from lightning_lars.rules import require
from lightning_lars.trainer.hyperparameters import as_logged
from lightning_lars.trainer.safe_globals import LoadFromCheckpoint, trust_globals_of
from lightning_lars.trainer.strategy_checks import check_strategy
from lightning_lars.trainer.training_length import scheduler_config

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
"""Builds an optimizer from parameter groups: ``LARS``, or ``functools.partial(LARS, lr=3.2)``."""

LRSchedulerCallable = Callable[[Optimizer], LRScheduler]
"""Builds a scheduler on an optimizer: ``functools.partial(WarmupDecayLR, warmup_steps=500)``."""


class LargeBatchMixin:
    """Gives a LightningModule a ``configure_optimizers`` that excludes norms and biases from adaptation.

    Must come before ``LightningModule`` in the bases. The optimizer is built over
    :func:`~lightning_lars.param_groups` of the module, after ``configure_model``. Also works without a
    Trainer, under Fabric or in a custom loop, where the length of a schedule must be given.

    The learning rate is part of ``optimizer``: ``Tuner.lr_find`` finds no attribute to write it to, and needs
    ``update_attr=False``.

    Args:
        *args: Passed on to the next class.
        optimizer: Takes the parameter groups and returns the optimizer: ``LARS`` (used for None), ``LAMB``,
            any ``torch.optim`` class, or one with arguments, such as ``functools.partial(LARS, lr=3.2)``.
        lr_scheduler: Takes the optimizer and returns a scheduler. A :class:`~lightning_lars.WarmupDecayLR`
            without ``total_steps`` gets the steps of the run, which depend on gradient accumulation,
            ``max_steps`` and the like.
        lr_scheduler_interval: When the scheduler steps. None means each optimizer step for
            ``WarmupDecayLR``, else each epoch.
        exclude: fnmatch patterns over parameter names to exclude in addition to norms, biases and gains. For
            module types and predicates, write a ``configure_optimizers`` that calls
            :func:`~lightning_lars.build_optimizer`.
        exclude_bias: Whether biases are excluded.
        exclude_norm: Whether normalization layers are excluded (apex LARC adapts them, as SwAV does).
        exclude_gain: Whether gains are excluded, and parameters broadcast over the batch, such as tokens.
        excluded_lr: Learning rate of excluded parameters, above 0, independent of ``optimizer``'s rate.
            Schedules and warmup apply to it, ``BatchSizeScaling`` does not. None keeps the rate of the
            adapted ones.
        excluded_lr_scale: The same as a factor, above 0, on the rate of the adapted parameters. Mutually
            exclusive with ``excluded_lr``.
        layer_decay: For fine-tuning, the factor, above 0 and at most 1, from the learning rate of each block
            to that of the block before it, as in :func:`~lightning_lars.param_groups`. None: one rate.
        layer_depth: With ``layer_decay``, the layers of parameters for which the order of the modules is not
            the depth, by fnmatch patterns over their names, ``{"head.*": 13}``, or by a function.
        matrix_optimizer: Another optimizer for the matrices of hidden layers, such as
            ``functools.partial(torch.optim.Muon, lr=0.02)``; ``optimizer`` takes the rest. Its rate is the
            peak of the schedule for the matrices, also where a scheduler has one rate for all groups.
        matrices: With ``matrix_optimizer``, what is a matrix where the rule of
            :func:`~lightning_lars.param_groups` does not fit, by fnmatch patterns over names,
            ``{"projector.*": True}``, or by a function.
        **kwargs: Passed on to the next class.

    Raises:
        TypeError: If ``optimizer`` is not callable; when subclassing, if ``LightningModule`` comes before
            the mixin in the bases and would hide it.

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

        All arguments at once, derived from the batch size by :func:`lightning_lars.recipes.lars`:

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
        layer_decay: float | None = None,
        layer_depth: LayerDepth | None = None,
        matrix_optimizer: OptimizerCallable | None = None,
        matrices: Matrices | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if optimizer is None:
            optimizer = LARS
        check_optimizer("optimizer", optimizer)
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
        check_layer_decay(layer_decay, layer_depth)
        self._layer_decay = layer_decay
        self._layer_depth = layer_depth
        check_matrix_optimizer(matrix_optimizer, matrices)
        self._build_matrix_optimizer = matrix_optimizer
        self._matrices = matrices
        self._trust_arguments()

    def _trust_arguments(self) -> None:
        """Allow the Trainer's ``ckpt_path`` to load the classes in this module's saved hyperparameters."""
        trust_globals_of(
            self._build_optimizer,
            self._build_lr_scheduler,
            self._layer_depth,
            self._build_matrix_optimizer,
            self._matrices,
        )

    load_from_checkpoint = LoadFromCheckpoint(_trust_arguments)

    @property
    def hparams_initial(self) -> Any:
        """The saved hyperparameters as loggers get them: a partial is its ``class_path`` and ``init_args``.

        Checkpoints take ``hparams``, where a partial is a partial.
        """
        return as_logged(cast(Any, super()).hparams_initial)

    def __setstate__(self, state: dict[str, Any]) -> None:
        cast(Any, super()).__setstate__(state)
        self._trust_arguments()  # in the process to which a strategy has sent the module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(LargeBatchMixin)]
        # By name, because lightning.pytorch and pytorch_lightning each define a LightningModule.
        if any(base.__name__ == "LightningModule" for base in before):
            raise TypeError(
                f"{cls.__name__} must have LargeBatchMixin before LightningModule in its bases, got "
                f"({', '.join(base.__name__ for base in cls.__bases__)}): "
                "LightningModule would hide configure_optimizers of the mixin"
            )

    def configure_optimizers(self) -> Any:
        """Build the optimizer over the module's adapted and excluded parameters, and its scheduler.

        Returns:
            The optimizer, or Lightning's dict of optimizer and scheduler.

        Raises:
            ValueError: If no parameter is trainable, an argument breaks its rule, the scheduler does not
                allow the excluded parameters or the layers a separate rate, or ``layer_decay`` finds no stack
                of blocks.
            TypeError: If ``optimizer`` does not return an optimizer.
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
            layer_decay=self._layer_decay,
            layer_depth=self._layer_depth,
            matrix_optimizer=self._build_matrix_optimizer,
            matrices=self._matrices,
        )
        check_strategy(cast(LightningModule, self), optimizer)
        if self._build_lr_scheduler is None:
            return optimizer
        of_matrices = matrix_rates(optimizer.param_groups)
        scheduler = self._build_lr_scheduler(optimizer)
        if not hasattr(scheduler, "optimizer"):
            raise TypeError(
                f"lr_scheduler must return a scheduler, got {scheduler!r} from {self._build_lr_scheduler!r}"
            )
        keep_group_rates(
            scheduler,
            optimizer.param_groups,
            self._excluded_lr,
            self._excluded_lr_scale,
            self._layer_decay,
            of_matrices,
        )
        config = scheduler_config(cast(LightningModule, self), scheduler, self._lr_scheduler_interval)
        return {"optimizer": optimizer, "lr_scheduler": config}
