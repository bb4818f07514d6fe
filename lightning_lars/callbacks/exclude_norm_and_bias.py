"""Regroups an optimizer that exists, for modules that cannot change."""

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lars.callbacks.both_roots import Callback
from lightning_lars.excluded_rate import (
    check_end,
    check_excluded_rate,
    is_excluded,
    is_own_rate,
    mark_own_rate,
    peak,
    rescale,
    set_excluded_rate,
    share,
    unknown,
)
from lightning_lars.introspection import DEFAULT_EXCLUDED, classify
from lightning_lars.optim.arguments import require
from lightning_lars.param_groups import check_holds_parameters
from lightning_lars.strategy_checks import check_strategy

# What torch's schedulers keep for each group, beside what they keep in it.
_PER_GROUP = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
)


class ExcludeNormAndBias(Callback):
    """Takes norms and biases out of the adaptation and the weight decay of the Trainer's optimizers.

    For optimizers that were built over bare ``parameters()``, as by ``LightningCLI --optimizer LARS``. Splits
    every group into what :func:`~lightning_lars.param_groups.param_groups` calls adapted and excluded, and
    leaves the learning rates and their schedulers as they are, or gives what is excluded a rate of its own.

    Args:
        exclude: fnmatch patterns over parameter names, to be excluded beside the normalization layers.
        exclude_bias: Whether biases are excluded too.
        excluded_lr: Learning rate of what is excluded, above 0, whatever that of the optimizer is: the peak
            of its schedule. ``BatchSizeScaling`` leaves it alone. None leaves the rate of the group.
        excluded_lr_scale: The same as a factor, above 0, on the rate of the group. Not together with
            ``excluded_lr``.

    Raises:
        ValueError: If an argument breaks its rule; at the start of training, if a pattern matches no
            parameter name, or an optimizer holds none of the module's parameters, or decays to a higher rate
            than ``excluded_lr``.
        MisconfigurationException: At the start of training, if a strategy has wrapped the optimizer, or a
            scheduler that computes rates in another way than torch's would have to be given ``excluded_lr``.

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
    ) -> None:
        require("exclude", "patterns over parameter names", exclude, isinstance(exclude, Sequence))
        require("exclude_bias", "True or False", exclude_bias, isinstance(exclude_bias, bool))
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.exclude_bias = exclude_bias
        check_excluded_rate(excluded_lr, excluded_lr_scale)
        self.excluded_lr = excluded_lr
        self.excluded_lr_scale = excluded_lr_scale

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before a checkpoint is restored, whose optimizer was regrouped too.
        layers = classify(pl_module, (*DEFAULT_EXCLUDED, *self.exclude), self.exclude_bias)
        names = {layer.parameter: layer.name for layer in layers}
        excluded = {layer.parameter for layer in layers if layer.group == "excluded"}
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, Optimizer):
                raise MisconfigurationException(
                    f"ExcludeNormAndBias cannot regroup {type(optimizer).__name__}, which a strategy has put "
                    "around the optimizer: call build_optimizer in configure_optimizers"
                )
            check_strategy(pl_module, optimizer)
            check_holds_parameters(optimizer, trainer.model or pl_module)
            # Names are for trust ratios. Without them, finetuning callbacks can add what they unfreeze.
            named = {} if not hasattr(optimizer, "trust_ratios") else names
            groups = [part for group in optimizer.param_groups for part in _split(group, excluded, named)]
            origins = [origin for origin, _ in groups]
            if len(groups) == len(optimizer.param_groups):
                rank_zero_warn(
                    f"ExcludeNormAndBias found nothing to split in {type(optimizer).__name__}: "
                    "its groups are apart already"
                )
                if not is_own_rate(self.excluded_lr, self.excluded_lr_scale):
                    continue
            indices = [next(i for i, g in enumerate(optimizer.param_groups) if g is o) for o in origins]
            schedulers = [
                config.scheduler
                for config in trainer.lr_scheduler_configs
                if config.scheduler.optimizer is optimizer
            ]
            self._check_schedulers(schedulers)
            optimizer.param_groups[:] = [part for _, part in groups]
            for scheduler in schedulers:
                _follow(scheduler, indices)
            self._set_excluded_rate(optimizer, schedulers)

    def _check_schedulers(self, schedulers: Sequence[Any]) -> None:
        others = unknown(*schedulers)
        if others and is_own_rate(self.excluded_lr, self.excluded_lr_scale):
            raise MisconfigurationException(
                "ExcludeNormAndBias can give what is excluded a learning rate of its own under torch's "
                f"schedulers, got a {others[0]}: build the optimizer by build_optimizer in "
                "configure_optimizers, and the scheduler on it"
            )

    def _set_excluded_rate(self, optimizer: Optimizer, schedulers: Sequence[Any]) -> None:
        if not is_own_rate(self.excluded_lr, self.excluded_lr_scale):
            return
        if not schedulers:
            groups = [group for group in optimizer.param_groups if is_excluded(group)]
            set_excluded_rate(groups, self.excluded_lr, self.excluded_lr_scale)
            return
        for index, group in enumerate(optimizer.param_groups):
            if is_excluded(group):
                highest = peak(schedulers, group, index)
                wanted = highest * self.excluded_lr_scale if self.excluded_lr is None else self.excluded_lr
                rescale(schedulers, group, index, share(wanted, highest))
                mark_own_rate(group, self.excluded_lr)
                for scheduler in schedulers:
                    check_end(scheduler, optimizer.param_groups, index, wanted, f"excluded_lr={wanted:g}")


def _split(
    group: dict[str, Any], excluded: set[Any], names: dict[Any, str]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the parts of a group, each with the group that it came from."""
    parts = []
    for part, overrides in (
        ("adapted", {}),
        ("excluded", {"layer_adaptation": False, "weight_decay": 0.0}),
    ):
        params = [p for p in group["params"] if (p in excluded) == (part == "excluded")]
        if params:
            name = f"{group['name']}/{part}" if "name" in group else part
            own_names = dict(zip(group["params"], group.get("param_names", ()), strict=False))
            known = names or own_names
            param_names = {"param_names": [known[p] for p in params]} if known else {}
            parts.append((group, {**group, "params": params, **param_names, "name": name, **overrides}))
    return parts


def _follow(scheduler: Any, indices: Sequence[int]) -> None:
    """Give every new group what the scheduler kept for the group that it came from."""
    for attribute in _PER_GROUP:
        kept = getattr(scheduler, attribute, None)
        if isinstance(kept, list) and len(kept) == max(indices) + 1:
            setattr(scheduler, attribute, [kept[index] for index in indices])
    for inner in getattr(scheduler, "_schedulers", ()):
        _follow(inner, indices)
