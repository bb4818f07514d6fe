"""Regroups an existing optimizer, for modules that cannot be changed."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lars.class_names import has_class_named
from lightning_lars.groups.excluded_rate import (
    check_excluded_rate,
    is_excluded,
    is_own_rate,
    mark_own_rate,
    set_excluded_rate,
)
from lightning_lars.groups.introspection import check_switches, classify
from lightning_lars.groups.regrouping import (
    all_or_nothing,
    are_split,
    extend_per_group_values,
    inner_optimizer,
    schedulers_in,
    split_groups,
)
from lightning_lars.groups.scheduled_rates import check_end, peak, rescale, scale_to, unknown_schedulers
from lightning_lars.groups.stale_parameters import check_holds_parameters
from lightning_lars.rules import require
from lightning_lars.trainer.callback import Callback
from lightning_lars.trainer.strategy_checks import check_strategy


class ExcludeNormAndBias(Callback):
    """Excludes norms, biases and gains from adaptation and weight decay in the Trainer's optimizers.

    For optimizers that were built over bare ``parameters()``, as by ``LightningCLI --optimizer LARS``. Splits
    every group into an adapted and an excluded one, as :func:`~lightning_lars.param_groups` does, and keeps
    learning rates and schedulers, or gives the excluded parameters a separate rate. If that fails, optimizers
    and schedulers are unchanged.

    An optimizer that does not read the key ``layer_adaptation`` (Adam, another package's LAMB) excludes them
    from weight decay only: whether it adapts them is its own rule.

    Args:
        exclude: fnmatch patterns over parameter names to exclude in addition to norms, biases and gains.
        exclude_bias: Whether biases are excluded.
        excluded_lr: Learning rate of excluded parameters, above 0, independent of the optimizer's rate: the
            peak of its schedule. ``BatchSizeScaling`` does not scale it. None keeps the rate of the group.
        excluded_lr_scale: The same as a factor, above 0, on the rate of the group. Mutually exclusive with
            ``excluded_lr``.
        exclude_norm: Whether normalization layers are excluded.
        exclude_gain: Whether gains are excluded, and parameters broadcast over the batch, such as tokens.

    Raises:
        ValueError: If an argument breaks its rule; at the start of training, if a pattern matches no
            parameter name, or an optimizer holds none of the module's parameters, or its schedule ends above
            ``excluded_lr``.
        MisconfigurationException: At the start of training, if the optimizer is wrapped in another, or is an
            LBFGS, which takes a single group; or a scheduler has lists that may be per group, or
            ``excluded_lr`` is set and a scheduler computes rates with code other than torch's.

    Example:
        >>> from lightning import Trainer
        >>> from lightning_lars import ExcludeNormAndBias
        >>> trainer = Trainer(callbacks=[ExcludeNormAndBias()], accelerator="cpu")
    """

    def __init__(
        self,
        exclude: Sequence[str] = (),
        exclude_bias: bool = True,
        excluded_lr: float | None = None,
        excluded_lr_scale: float = 1.0,
        exclude_norm: bool = True,
        exclude_gain: bool = True,
    ) -> None:
        require("exclude", "patterns over parameter names", exclude, isinstance(exclude, Sequence))
        check_switches(exclude_norm=exclude_norm, exclude_bias=exclude_bias, exclude_gain=exclude_gain)
        check_excluded_rate(excluded_lr, excluded_lr_scale)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.exclude_norm = exclude_norm
        self.exclude_bias = exclude_bias
        self.exclude_gain = exclude_gain
        self.excluded_lr = excluded_lr
        self.excluded_lr_scale = excluded_lr_scale

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before a checkpoint is restored, because its optimizer was regrouped too.
        layers = classify(
            pl_module,
            self.exclude,
            exclude_norm=self.exclude_norm,
            exclude_bias=self.exclude_bias,
            exclude_gain=self.exclude_gain,
        )
        names: dict[Tensor, str] = {layer.parameter: layer.name for layer in layers}
        excluded = {layer.parameter for layer in layers if layer.group == "excluded"}
        for optimizer in trainer.optimizers:
            _check_optimizer(optimizer)
            check_strategy(pl_module, optimizer)
            check_holds_parameters(optimizer, trainer.model or pl_module)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        with all_or_nothing(trainer.optimizers, schedulers):
            for optimizer in trainer.optimizers:
                own = [each for each in schedulers if schedulers_in(each, optimizer)]
                self._regroup(optimizer, own, excluded, names)

    def _regroup(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[Any],
        excluded: Collection[Tensor],
        names: Mapping[Tensor, str],
    ) -> None:
        # Names are for trust ratios. Without names, finetuning callbacks can add the layers that they
        # unfreeze.
        named = names if hasattr(optimizer, "trust_ratios") else {}
        split = split_groups(optimizer.param_groups, excluded, named)
        if not are_split(optimizer.param_groups, split):
            for scheduler in schedulers:
                try:
                    extend_per_group_values(scheduler, optimizer, [origin for origin, _ in split])
                except TypeError as error:
                    raise MisconfigurationException(
                        f"ExcludeNormAndBias cannot regroup {type(optimizer).__name__}, because {error}: "
                        "build it with build_optimizer in configure_optimizers, and the scheduler on it"
                    ) from None
            optimizer.param_groups[:] = [part for _, part in split]
        else:
            held = (p for group in optimizer.param_groups for p in group["params"])
            holds_any = any(p in excluded for p in held)
            reason = "its groups are already split" if holds_any else "it holds no parameter to exclude"
            rank_zero_warn(
                f"ExcludeNormAndBias found nothing to split in {type(optimizer).__name__}: {reason}"
            )
        self._set_excluded_rate(optimizer, schedulers)

    def _set_excluded_rate(self, optimizer: Optimizer, schedulers: Sequence[Any]) -> None:
        if not is_own_rate(self.excluded_lr, self.excluded_lr_scale):
            return
        others = unknown_schedulers(*schedulers)
        if others:
            raise MisconfigurationException(
                "ExcludeNormAndBias can give excluded parameters a separate rate only under torch's "
                f"schedulers, got a {others[0]}: build the optimizer with build_optimizer in "
                "configure_optimizers, and the scheduler on it"
            )
        if not schedulers:
            groups = [group for group in optimizer.param_groups if is_excluded(group)]
            set_excluded_rate(groups, self.excluded_lr, self.excluded_lr_scale)
            return
        for index, group in enumerate(optimizer.param_groups):
            if is_excluded(group):
                highest = peak(schedulers, group, index)
                wanted = highest * self.excluded_lr_scale
                if self.excluded_lr is not None:
                    wanted = self.excluded_lr * group.get("lr_scale", 1.0)
                rescale(schedulers, group, index, scale_to(wanted, highest))
                mark_own_rate(group, self.excluded_lr)
                for scheduler in schedulers:
                    check_end(scheduler, optimizer.param_groups, index, wanted, f"excluded_lr={wanted:g}")


def _check_optimizer(optimizer: Any) -> None:
    """Raise if the optimizer is a strategy's wrapper, wraps another, or takes a single group."""
    if not isinstance(optimizer, Optimizer):
        raise MisconfigurationException(
            f"ExcludeNormAndBias cannot regroup {type(optimizer).__name__}, in which a strategy has wrapped "
            "the optimizer: call build_optimizer in configure_optimizers"
        )
    if has_class_named(optimizer, "LBFGS"):
        raise MisconfigurationException(
            f"ExcludeNormAndBias cannot regroup {type(optimizer).__name__}, whose step takes a single group: "
            "remove the callback"
        )
    inner = inner_optimizer(optimizer)
    if inner is not None:
        raise MisconfigurationException(
            f"ExcludeNormAndBias cannot regroup {type(optimizer).__name__}, because the "
            f"{type(inner).__name__} in it has separate groups: call param_groups in configure_optimizers"
        )
