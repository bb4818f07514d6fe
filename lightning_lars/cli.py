"""The door for those who drive everything from a YAML file or the command line."""

from functools import partial, update_wrapper
from types import MethodType
from typing import Any, Literal

import lightning.pytorch.cli
import pytorch_lightning.cli
from lightning.pytorch import LightningModule
from torch.optim import Optimizer

from lightning_lars.introspection import DEFAULT_EXCLUDED
from lightning_lars.param_groups import build_optimizer
from lightning_lars.training_length import scheduler_config

_EitherCLI: Any = object


class _LateOptimizer(_EitherCLI):  # type: ignore[misc]
    """Builds ``--optimizer`` in ``configure_optimizers``, over the groups of ``param_groups``.

    The stock CLI builds it as soon as the model exists, over bare ``parameters()``: norms and biases are
    adapted like the rest, and a strategy that replaces the parameters later leaves it with none.
    """

    def __init__(self, *args: Any, auto_configure_optimizers: bool = True, **kwargs: Any) -> None:
        self._builds_optimizer = auto_configure_optimizers
        super().__init__(*args, auto_configure_optimizers=False, **kwargs)

    def add_core_arguments_to_parser(self, parser: Any) -> None:
        """Add ``--optimizer``, ``--lr_scheduler`` and how both are built."""
        super().add_core_arguments_to_parser(parser)
        if not self._builds_optimizer:
            return
        parser.add_optimizer_args((Optimizer,))
        parser.add_lr_scheduler_args()
        parser.add_argument(
            "--lr_scheduler_interval",
            type=Literal["step", "epoch"] | None,
            default=None,
            help="When the scheduler steps (null: each optimizer step for WarmupDecayLR, else each epoch).",
        )
        parser.add_argument(
            "--param_groups.exclude",
            type=list[str],
            default=[],
            help="Patterns over the names of parameters that are excluded beside the normalization layers.",
        )
        parser.add_argument(
            "--param_groups.exclude_bias",
            type=bool,
            default=True,
            help="Whether biases are excluded from adaptation and weight decay.",
        )
        parser.add_argument(
            "--param_groups.excluded_lr_scale",
            type=float,
            default=1.0,
            help="Factor on the learning rate of what is excluded.",
        )

    def instantiate_classes(self) -> None:
        """Let the model build its optimizer when it is asked to, after ``configure_model``."""
        super().instantiate_classes()
        config = self.config_init if self.subcommand is None else self.config_init[self.subcommand]
        if not self._builds_optimizer or not config.get("optimizer"):
            return
        method = partial(
            _configure_optimizers,
            optimizer=config["optimizer"],
            lr_scheduler=config.get("lr_scheduler"),
            lr_scheduler_interval=config["lr_scheduler_interval"],
            groups=config["param_groups"],
        )
        # Lightning looks through a wrapper for the code that overrides its own method.
        self.model.configure_optimizers = MethodType(
            update_wrapper(method, _configure_optimizers), self.model
        )


def _configure_optimizers(
    module: LightningModule,
    *,
    optimizer: Any,
    lr_scheduler: Any,
    lr_scheduler_interval: Literal["step", "epoch"] | None,
    groups: Any,
) -> Any:
    built = build_optimizer(
        module,
        partial(lightning.pytorch.cli.instantiate_class, init=optimizer),
        exclude=(*DEFAULT_EXCLUDED, *groups["exclude"]),
        exclude_bias=groups["exclude_bias"],
        excluded_lr_scale=groups["excluded_lr_scale"],
    )
    if not lr_scheduler:
        return built
    scheduler = lightning.pytorch.cli.instantiate_class(built, lr_scheduler)
    config = scheduler_config(module.trainer, scheduler, lr_scheduler_interval)
    return {"optimizer": built, "lr_scheduler": config}


class LargeBatchCLI(_LateOptimizer, lightning.pytorch.cli.LightningCLI):
    """``LightningCLI`` whose ``--optimizer LARS`` knows norms and biases, under every strategy.

    Takes the arguments of ``LightningCLI``, and on the command line or in YAML ``lr_scheduler_interval``
    (``step`` or ``epoch``) and ``param_groups`` (``exclude``, ``exclude_bias``, ``excluded_lr_scale``). A
    :class:`~lightning_lars.schedules.WarmupDecayLR` without ``total_steps`` gets those of the training.
    Import this module, or ``lightning_lars``, to use the short names ``LARS``, ``LAMB``, ``WarmupDecayLR``.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_lars.cli import LargeBatchCLI
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> arguments = ["--optimizer=lightning_lars.LARS", "--optimizer.lr=0.5", "--seed_everything=0"]
        >>> cli = LargeBatchCLI(BoringModel, trainer_defaults=quiet, args=arguments, run=False)
        >>> for group in cli.model.configure_optimizers().param_groups:
        ...     print(group["name"], group["lr"], group["param_names"])
        adapted 0.5 ['layer.weight']
        excluded 0.5 ['layer.bias']
    """


class PytorchLightningLargeBatchCLI(_LateOptimizer, pytorch_lightning.cli.LightningCLI):
    """:class:`LargeBatchCLI` for the modules and Trainers of ``pytorch_lightning``."""
