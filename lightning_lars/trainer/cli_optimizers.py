"""The ``configure_optimizers`` that a LightningCLI gives to a model."""

from functools import partial
from typing import Any, Literal

import lightning.pytorch.cli
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_lars.groups.build import build_optimizer
from lightning_lars.groups.scheduled_rates import keep_group_rates, matrix_rates
from lightning_lars.trainer.strategy_checks import check_strategy
from lightning_lars.trainer.training_length import scheduler_config


class ConfigureOptimizers:
    """Replaces a model's ``configure_optimizers``, and can be pickled with it for other processes.

    Args:
        module: The model.
        optimizer: ``class_path`` and ``init_args`` of the optimizer.
        lr_scheduler: The same of the scheduler, or None.
        lr_scheduler_interval: When the scheduler steps; None for its own default.
        groups: The keyword arguments of :func:`~lightning_lars.build_optimizer`.
    """

    def __init__(
        self,
        module: LightningModule,
        optimizer: Any,
        lr_scheduler: Any,
        lr_scheduler_interval: Literal["step", "epoch"] | None,
        groups: Any,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self.groups = groups

    def __call__(self) -> Any:
        """Return what ``configure_optimizers`` returns."""
        return self.__wrapped__()

    def __wrapped__(self) -> Any:  # where Lightning looks for overrides
        optimizer = build_optimizer(
            self.module,
            partial(lightning.pytorch.cli.instantiate_class, init=self.optimizer),
            **self.groups,
        )
        check_strategy(self.module, optimizer)
        if not self.lr_scheduler:
            return optimizer
        of_matrices = matrix_rates(optimizer.param_groups)
        scheduler = lightning.pytorch.cli.instantiate_class(optimizer, self.lr_scheduler)
        keep_group_rates(
            scheduler,
            optimizer.param_groups,
            self.groups["excluded_lr"],
            self.groups["excluded_lr_scale"],
            self.groups["layer_decay"],
            of_matrices,
        )
        config = scheduler_config(self.module, scheduler, self.lr_scheduler_interval)
        return {"optimizer": optimizer, "lr_scheduler": config}


def warn_of_override(model: LightningModule, cli: str) -> None:
    """Warn, as the stock CLI does, if a model has its own ``configure_optimizers``."""
    owner = next(each for each in (model, *type(model).__mro__) if "configure_optimizers" in vars(each))
    # By name, because lightning.pytorch and pytorch_lightning each define a LightningModule.
    by = getattr(owner, "__name__", "")
    if by == "LightningModule":
        return
    unused = ", and the arguments of LargeBatchMixin have no effect" if by == "LargeBatchMixin" else ""
    rank_zero_warn(
        f"`{type(model).__name__}.configure_optimizers` will be overridden by `{cli}`, which builds "
        f"--optimizer{unused}: use only one of the two"
    )
