"""Logs the trust ratio of every layer."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_lars.callbacks.both_roots import Callback
from lightning_lars.param_groups import check_holds_parameters


@runtime_checkable
class HasTrustRatios(Protocol):
    """A ``torch.optim.Optimizer`` that tells the trust ratio of every layer in its last step."""

    def trust_ratios(self) -> dict[str, Tensor]:
        """Return 0-d tensors by parameter name."""
        ...

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """Call the hook after every step."""
        ...


class TrustRatioMonitor(Callback):
    """Logs trust ratios to every logger of the Trainer, whenever Lightning logs (``log_every_n_steps``).

    What is logged are the ratios that the last step used, so steps that a gradient scaler skipped leave
    nothing. They come to the host in one transfer when they are logged, and not at all in between.
    Lightning counts optimizer steps, or batches in manual optimization, where an optimizer that has not
    stepped since the last log is left out.

    ======================  ===========================================================
    Key                     Value
    ======================  ===========================================================
    ``trust_ratio/NAME``    Ratio of the layer with this parameter name
    ``trust_ratio/min``     Smallest ratio of all layers
    ``trust_ratio/median``  Median over all layers
    ``trust_ratio/max``     Largest ratio of all layers
    ======================  ===========================================================

    With several optimizers (manual optimization) the keys are ``trust_ratio/OPTIMIZER/...``, numbered as
    ``LearningRateMonitor`` does: ``LARS``, ``LARS-1``. Minimum, median and maximum are also in
    ``trainer.callback_metrics``, from the first log on.

    Raises:
        MisconfigurationException: At the start of training, if the Trainer has no logger, or no optimizer
            that has trust ratios.

    Example:
        >>> from lightning import Trainer
        >>> from lightning_lars import TrustRatioMonitor
        >>> trainer = Trainer(callbacks=[TrustRatioMonitor()], accelerator="cpu", logger=True)
    """

    def __init__(self) -> None:
        self._optimizers: dict[str, HasTrustRatios] = {}
        self._stepped: set[str] = set()
        self._hooks: list[RemovableHandle] = []

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
        self._optimizers = _by_prefix(optimizers)
        for prefix, watched in self._optimizers.items():
            hook = watched.register_step_post_hook(lambda *_, p=prefix: self._stepped.add(p))
            self._hooks.append(hook)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Only the connector knows when Lightning logs its own metrics, and only the loop on which x-axis.
        if self._stepped and trainer._logger_connector.should_update_logs:
            ratios, summary = self._fetch()
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            for logger in trainer.loggers:
                logger.log_metrics({**ratios, **summary}, step=step)
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in summary.items()})
            self._stepped.clear()
        elif pl_module.automatic_optimization:
            # Lightning asks for logs on every batch that is accumulated for a step; the step is in the last.
            self._stepped.clear()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._optimizers.clear()
        self._stepped.clear()

    def _fetch(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the ratios of every optimizer that stepped, and their summaries, by key."""
        on_device = {
            (prefix, name): ratio
            for prefix, optimizer in self._optimizers.items()
            if prefix in self._stepped
            for name, ratio in optimizer.trust_ratios().items()
        }
        if not on_device:
            return {}, {}
        first = next(iter(on_device.values()))
        # The one transfer to the host: what follows is arithmetic there.
        values = torch.stack([ratio.to(first, non_blocking=True) for ratio in on_device.values()]).cpu()
        ratios = dict(zip(map("/".join, on_device), values.tolist(), strict=True))
        summary = {}
        for prefix in self._optimizers:
            of_optimizer = values[[prefix == owner for owner, _ in on_device]]
            if len(of_optimizer):
                summary[f"{prefix}/min"] = of_optimizer.min().item()
                summary[f"{prefix}/median"] = of_optimizer.quantile(0.5).item()
                summary[f"{prefix}/max"] = of_optimizer.max().item()
        return ratios, summary


def _by_prefix(optimizers: Sequence[HasTrustRatios]) -> dict[str, HasTrustRatios]:
    if len(optimizers) == 1:
        return {"trust_ratio": optimizers[0]}
    seen: Counter[str] = Counter()
    prefixes = {}
    for optimizer in optimizers:
        name = type(optimizer).__name__
        number = f"-{seen[name]}" if seen[name] else ""
        prefixes[f"trust_ratio/{name}{number}"] = optimizer
        seen[name] += 1
    return prefixes
