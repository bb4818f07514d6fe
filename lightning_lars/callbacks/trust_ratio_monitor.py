"""Logs what the trust ratios do: over all layers, and layer by layer where it was asked for."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from statistics import median
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_lars.callbacks.both_roots import Callback
from lightning_lars.optim.arguments import require
from lightning_lars.optim.parameters import named_params
from lightning_lars.param_groups import check_holds_parameters
from lightning_lars.step_statistics import HasTrustRatios, OverSteps, StepStatistics
from lightning_lars.trust_ratio_alerts import TrustRatioAlerts

_QUANTITIES = ("trust_ratio", "effective_lr", "update_to_weight")
_SHARES = ("at_trust_clip", "at_zero_rule")


class TrustRatioMonitor(Callback):
    """Logs trust ratios and what they made of the learning rate, whenever Lightning logs.

    Accumulates on the device over all steps between two logs (``log_every_n_steps``) and comes to the host
    in one transfer when it logs. A step that a gradient scaler skipped leaves nothing. Warns, once for each
    layer and cause, where a ratio is not finite, stays at its clip or far from those of the other layers,
    where weights do not move, and where ``trust_coefficient * lr`` never moves anything.

    Lightning counts optimizer steps, or batches in manual optimization, where an optimizer that has not
    stepped since the last log is left out.

    Args:
        layers: fnmatch patterns over parameter names, of layers to be logged one by one: ``"*"`` for all.
            By default none is, and loggers with histograms (TensorBoard, Weights & Biases) get one of all
            layers.
        update_to_weight: Whether to measure by how much the steps that are logged move the weights, for
            which the adapted weights are copied before the step.
        alerts: Whether to warn.

    ================================  =================================================================
    Key                               Value
    ================================  =================================================================
    ``trust_ratio/min``               Smallest ratio of any layer in any step since the last log
    ``trust_ratio/median``            Median over layers of their mean since the last log
    ``trust_ratio/max``               Largest ratio of any layer in any step since the last log
    ``trust_ratio/at_trust_clip``     Share of layers whose ratio ``trust_clip`` changed, from 0 to 1
    ``trust_ratio/at_zero_rule``      Share of layers whose ratio is 1 as weights or gradients are zero
    ``effective_lr/...``              ``min``, ``median``, ``max`` of learning rate times trust ratio
    ``update_to_weight/...``          The same of ``|change of w| / |w|``, in the steps that are logged
    ``trust_ratio_per_layer/NAME``    Mean since the last log of a layer that ``layers`` names
    ``effective_lr_per_layer/NAME``   The same of its effective learning rate
    ``update_to_weight_per_layer/..`` The same of its update-to-weight ratio
    ================================  =================================================================

    With several optimizers (manual optimization) the keys are ``trust_ratio/OPTIMIZER/...``, numbered as
    ``LearningRateMonitor`` does: ``LARS``, ``LARS-1``. What is not per layer is also in
    ``trainer.callback_metrics``, from the first log on.

    Raises:
        ValueError: If ``layers`` is no pattern; at the start of training, if a pattern matches no layer.
        MisconfigurationException: At the start of training, if the Trainer has no logger, or no optimizer
            that has trust ratios.

    Example:
        >>> from lightning import Trainer
        >>> from lightning_lars import TrustRatioMonitor
        >>> monitor = TrustRatioMonitor(layers=["backbone.*"])
        >>> trainer = Trainer(callbacks=[monitor], accelerator="cpu", logger=True)
    """

    def __init__(
        self, layers: str | Sequence[str] = (), update_to_weight: bool = True, alerts: bool = True
    ) -> None:
        patterns = (layers,) if isinstance(layers, str) else layers
        is_valid = isinstance(patterns, Sequence) and all(isinstance(pattern, str) for pattern in patterns)
        require("layers", "patterns over parameter names", layers, is_valid)
        require("update_to_weight", "True or False", update_to_weight, isinstance(update_to_weight, bool))
        require("alerts", "True or False", alerts, isinstance(alerts, bool))
        self.layers = tuple(patterns)
        self.update_to_weight = update_to_weight
        self.alerts = alerts
        self._watched: dict[str, StepStatistics] = {}
        self._alerts: dict[str, TrustRatioAlerts] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        if not trainer.loggers:
            raise MisconfigurationException(
                "TrustRatioMonitor has nowhere to log to: give the Trainer a logger (logger=True) "
                "or leave the callback out"
            )
        optimizers = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, HasTrustRatios)]
        if not optimizers:
            raise MisconfigurationException(
                "TrustRatioMonitor needs an optimizer with trust ratios, got "
                f"{[type(optimizer).__name__ for optimizer in trainer.optimizers]}: "
                "use LARS or LAMB in configure_optimizers or leave the callback out"
            )
        for optimizer in optimizers:
            check_holds_parameters(optimizer, trainer.model or pl_module)
        self._check_patterns(optimizers)

        def measures_updates() -> bool:
            # Only the connector knows when Lightning logs its own metrics.
            return self.update_to_weight and trainer._logger_connector.should_update_logs

        for name, watched in _by_name(optimizers).items():
            self._watched[name] = StepStatistics(watched, measures_updates)
            self._alerts[name] = TrustRatioAlerts()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        stepped = [watched.has_stepped for watched in self._watched.values()]
        for watched in self._watched.values():
            watched.has_stepped = False
        # Lightning asks for logs on every batch that is accumulated for a step; the step is in the last.
        is_complete = any(stepped) or not pl_module.automatic_optimization
        if not is_complete or not trainer._logger_connector.should_update_logs:
            return
        taken = {name: of for name, watched in self._watched.items() if (of := watched.take())}
        if not taken:
            return
        # Only the loop knows on which x-axis Lightning logs.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        summary: dict[str, float] = {}
        per_layer: dict[str, float] = {}
        for name, quantities in taken.items():
            summary.update(_summary(quantities, name))
            per_layer.update(self._of_layers(quantities, name))
        for logger in trainer.loggers:
            logger.log_metrics({**summary, **per_layer}, step=step)
            for name, quantities in taken.items():
                _log_histograms(logger, quantities, name, step)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in summary.items()})
        for name, quantities in taken.items():
            self._warn(self._alerts[name].look(quantities))
            self._warn(self._alerts[name].look_at_peak(self._watched[name].rates))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, watched in self._watched.items():
            self._warn(self._alerts[name].look_at_peak(watched.rates, is_over=True))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _detach(self) -> None:
        for watched in self._watched.values():
            watched.detach()
        self._watched.clear()
        self._alerts.clear()

    def _warn(self, messages: Iterable[str]) -> None:
        if self.alerts:
            for message in messages:
                rank_zero_warn(message)

    def _check_patterns(self, optimizers: Sequence[HasTrustRatios]) -> None:
        names = [
            name
            for optimizer in optimizers
            for name, p in named_params(
                [group for group in optimizer.param_groups if group.get("layer_adaptation", True)]
            )
        ]
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for name in names):
                close = get_close_matches(pattern, names, n=3, cutoff=0.0)
                raise ValueError(
                    f"layers must match the name of an adapted layer, got {pattern!r}; the closest are "
                    f"{', '.join(map(repr, close))}"
                )

    def _of_layers(
        self, quantities: Mapping[str, Mapping[str, OverSteps]], optimizer: str
    ) -> dict[str, float]:
        return {
            f"{quantity}_per_layer/{optimizer}{layer}": over_steps.mean
            for quantity in _QUANTITIES
            for layer, over_steps in quantities.get(quantity, {}).items()
            if any(fnmatchcase(layer, pattern) for pattern in self.layers)
        }


def _summary(quantities: Mapping[str, Mapping[str, OverSteps]], optimizer: str) -> dict[str, float]:
    summary = {}
    for quantity in _QUANTITIES:
        layers = quantities.get(quantity, {}).values()
        if layers:
            # A layer that is not finite shows: min and max would order nan by chance.
            spoiled = math.nan if any(math.isnan(layer.mean) for layer in layers) else 0.0
            summary[f"{quantity}/{optimizer}min"] = spoiled + min(layer.minimum for layer in layers)
            summary[f"{quantity}/{optimizer}median"] = spoiled + median(layer.mean for layer in layers)
            summary[f"{quantity}/{optimizer}max"] = spoiled + max(layer.maximum for layer in layers)
    for share in _SHARES:
        layers = quantities.get(share, {}).values()
        if layers:
            summary[f"trust_ratio/{optimizer}{share}"] = sum(layer.mean for layer in layers) / len(layers)
    return summary


def _log_histograms(
    logger: Any, quantities: Mapping[str, Mapping[str, OverSteps]], optimizer: str, step: int
) -> None:
    for quantity in _QUANTITIES:
        values = [layer.mean for layer in quantities.get(quantity, {}).values() if math.isfinite(layer.mean)]
        if not values:
            continue
        key = f"{quantity}_per_layer/{optimizer}all"
        # By name, as lightning.pytorch and pytorch_lightning have loggers of their own.
        kinds = {base.__name__ for base in type(logger).__mro__}
        if "TensorBoardLogger" in kinds:
            logger.experiment.add_histogram(key, torch.tensor(values), step)
        elif "WandbLogger" in kinds:
            from wandb import Histogram

            logger.log_metrics({key: Histogram(values)}, step=step)


def _by_name(optimizers: Sequence[HasTrustRatios]) -> dict[str, HasTrustRatios]:
    """Return the optimizers by what stands before the last part of their keys."""
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
