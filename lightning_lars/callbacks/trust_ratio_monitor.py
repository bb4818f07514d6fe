"""Logs, plots and prints trust ratios, updates and gradient norms, over all layers and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_lars.callbacks.trust_ratio_checks import check_layers, observable_optimizers
from lightning_lars.callbacks.trust_ratio_outputs import write_outputs
from lightning_lars.groups.optimizer_names import by_name
from lightning_lars.groups.parameter_names import names_of
from lightning_lars.groups.stale_parameters import check_holds_parameters
from lightning_lars.rules import FLAG, NONE_OR_FLAG, require
from lightning_lars.trainer.callback import Callback
from lightning_lars.trainer.logging import is_logging, log, logged_step, publish
from lightning_lars.trainer.training_length import total_steps
from lightning_lars.trust_ratios.history import TrustRatioHistory
from lightning_lars.trust_ratios.layer_statistics import OverSteps
from lightning_lars.trust_ratios.metrics import log_histograms, per_layer_metrics, summary_metrics
from lightning_lars.trust_ratios.optimizer_report import OptimizerReport
from lightning_lars.trust_ratios.plot import check_picture, plot_history, plot_trust_ratios
from lightning_lars.trust_ratios.step_statistics import FOR_ALERTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class TrustRatioMonitor(Callback):
    """Logs trust ratios and effective learning rates whenever Lightning logs.

    Accumulates statistics on the device over all steps between two logs (``log_every_n_steps``), and copies
    them to the host once per log, and once after the first step of a layer. A step that a gradient scaler
    skipped does not count.

    Of an optimizer without trust ratios, such as AdamW, it logs, plots and prints by how much the logged
    steps move each layer (``update_to_weight``), ``gradient_norm``, and as ``effective_lr`` the learning rate
    at which plain gradient descent would have moved it as far.

    Warns, once for each layer and cause, if a ratio is not finite, at its clip since training began, or far
    from the ratios of other layers; if weights do not move, or shrink for lack of a gradient; and if a
    zero-initialized layer takes a harmfully long first step. Warns once if ``trust_coefficient * lr`` is
    always negligible, and if the learning rate of excluded parameters is higher than SGD or Adam usually
    tolerate. ``docs/trust_ratios.md`` gives the exact conditions and reasons.

    Lightning counts optimizer steps, or batches in manual optimization, where an optimizer that has not
    stepped since the last log is skipped.

    Args:
        layers: fnmatch patterns over the names of parameters to log individually: ``"*"`` for all. By
            default none is, and loggers with histograms (TensorBoard, Weights & Biases) get one over all
            layers. Names come from the optimizer, or from the LightningModule where it has none.
        update_to_weight: Whether to measure by how much the logged steps move the weights, for which the
            adapted weights are copied before the step.
        gradient_norm: Whether to measure the gradient norm of each layer in the logged steps, after clipping.
            None: for optimizers without trust ratios.
        alerts: Whether to warn about layers.
        picture: File for a plot that is saved when training ends, even by an error: a heatmap of the trust
            ratios, layers over steps, and the effective learning rate of each layer in front of the
            schedule. Relative paths are resolved against ``trainer.log_dir``. Needs matplotlib
            (``lightning-lars[plot]``).
        table: Whether to print statistics of the trust ratio of each layer when training ends.
        report: HTML file that is saved when training ends, even by an error: the same heatmap with names and
            values on hover, with parameter groups, hyperparameters, versions and the warnings that were
            given. It loads nothing. Relative paths as for ``picture``.

    ================================  =================================================================
    Key                               Value
    ================================  =================================================================
    ``trust_ratio/min``               Smallest ratio of any layer in any step since the last log
    ``trust_ratio/median``            Median over layers of their mean since the last log
    ``trust_ratio/max``               Largest ratio of any layer in any step since the last log
    ``trust_ratio/at_trust_clip``     Fraction of layers whose ratio ``trust_clip`` changed
    ``trust_ratio/at_zero_rule``      Fraction of layers of ratio 1: ``|w|`` or the denominator is 0
    ``trust_ratio/by_decay_alone``    Fraction of layers that weight decay alone moved, without a gradient
    ``effective_lr/...``              ``min``, ``median``, ``max`` of learning rate times trust ratio
    ``update_to_weight/...``          The same for ``|change of w| / |w|``, in the logged steps
    ``gradient_norm/...``             The same for ``|g|``, in the logged steps
    ``trust_ratio_per_layer/NAME``    Mean since the last log, for each layer that matches ``layers``
    ``effective_lr_per_layer/NAME``   The same for its effective learning rate
    ``update_to_weight_per_layer/…``  The same for its update-to-weight ratio
    ``gradient_norm_per_layer/NAME``  The same for its gradient norm
    ================================  =================================================================

    With several optimizers (manual optimization, or in a ``CombinedOptimizer``) the keys are
    ``trust_ratio/OPTIMIZER/...``, numbered as in ``LearningRateMonitor``: ``LARS``, ``LARS-1``. Metrics that
    are not per layer are also in ``trainer.callback_metrics``, from the first log on: for ``EarlyStopping``
    to find them at the end of the first epoch, ``log_every_n_steps`` must not exceed the steps of an epoch.

    Plot and table cover everything logged since the start of training, including before a resume. The plot
    has at most 512 columns, however long the run. ``plot()`` draws it at any time. Several monitors in one
    Trainer must differ in ``layers``, in ``table``, or in whether they have a ``picture`` or a ``report``.

    Raises:
        ModuleNotFoundError: If ``picture`` is given without matplotlib.
        ValueError: If ``layers`` is no pattern; at the start of training, if a pattern matches no layer,
            adapted or frozen.
        MisconfigurationException: At the start of training, if there is nowhere to log to, no
            ``torch.optim`` optimizer, or nothing to measure of one without trust ratios.

    Example:
        >>> from lightning import Trainer
        >>> from lightning_lars import TrustRatioMonitor
        >>> monitor = TrustRatioMonitor(layers=["backbone.*"])
        >>> trainer = Trainer(callbacks=[monitor], accelerator="cpu", logger=True)
    """

    def __init__(
        self,
        layers: str | Sequence[str] = (),
        update_to_weight: bool = True,
        alerts: bool = True,
        picture: str | Path | None = None,
        table: bool = False,
        gradient_norm: bool | None = None,
        report: str | Path | None = None,
    ) -> None:
        patterns = (layers,) if isinstance(layers, str) else layers
        is_valid = isinstance(patterns, Sequence) and all(isinstance(pattern, str) for pattern in patterns)
        require("layers", "patterns over parameter names", layers, is_valid)
        FLAG.check("update_to_weight", update_to_weight)
        NONE_OR_FLAG.check("gradient_norm", gradient_norm)
        FLAG.check("alerts", alerts)
        FLAG.check("table", table)
        if picture is not None:
            check_picture("picture", picture)
        is_page = isinstance(report, str | Path) and Path(report).suffix == ".html"
        require("report", "a file name that ends in .html", report, report is None or is_page)
        self.layers = tuple(patterns)
        self.update_to_weight = update_to_weight
        self.gradient_norm = gradient_norm
        self.alerts = alerts
        self.picture = picture
        self.report = report
        self.table = table
        self._history = TrustRatioHistory()
        self._picture: Path | None = None
        self._report: Path | None = None
        self._warnings: list[str] = []
        self._reports: dict[str, OptimizerReport] = {}
        self._total_steps = math.inf

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            # Resuming from a checkpoint fills it before training starts.
            self._history = TrustRatioHistory()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        if not trainer.loggers and not self._keeps_history:
            raise MisconfigurationException(
                "TrustRatioMonitor has nowhere to log to: give the Trainer a logger (logger=True), set "
                "picture, table or report, or remove the callback"
            )
        optimizers = observable_optimizers(
            trainer, measures_nothing_else=not self.update_to_weight and self.gradient_norm is False
        )
        for optimizer in optimizers:
            check_holds_parameters(optimizer, trainer.model or pl_module)
        names = names_of(pl_module)
        check_layers(self.layers, optimizers, names)
        named = by_name(optimizers)
        self._history.set_order(f"{name}{layer}" for name in named for layer in names.values())
        self._warnings = []
        if (self.picture or self.report) and not cast(Any, trainer).fast_dev_run:
            # All ranks must access the folder.
            folder = Path(trainer.log_dir or trainer.default_root_dir)
            # Joining keeps an absolute path.
            self._picture = None if self.picture is None else folder / self.picture
            self._report = None if self.report is None else folder / self.report

        self._total_steps = total_steps(trainer)
        for name, optimizer in named.items():
            self._reports[name] = OptimizerReport(
                optimizer,
                partial(is_logging, trainer),
                names,
                updates=self.update_to_weight,
                gradients=self.gradient_norm,
                is_resumed=trainer.global_step > 0,
            )

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        has_stepped = False
        for name, report in self._reports.items():
            has_stepped |= report.statistics.has_stepped
            report.statistics.has_stepped = False
            if self.alerts:
                self._warn(name, report.first_step_warnings())
        # Lightning logs on every batch that is accumulated for a step; the step is in the last one.
        is_complete = has_stepped or not pl_module.automatic_optimization
        if not is_complete or not is_logging(trainer):
            return
        flushed = self._flush(trainer)
        if not flushed:
            return
        summary: dict[str, float] = {}
        per_layer: dict[str, float] = {}
        for name, quantities in flushed.items():
            summary.update(summary_metrics(quantities, name))
            per_layer.update(per_layer_metrics(quantities, name, self.layers))
        log(trainer, {**summary, **per_layer})
        for logger in trainer.loggers:
            for name, quantities in flushed.items():
                log_histograms(logger, quantities, name, logged_step(trainer))
        publish(trainer, summary)
        for name, quantities in flushed.items():
            self._warn_of(trainer, name, quantities, self._total_steps)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        flushed = self._flush(trainer)
        for name in self._reports:
            self._warn_of(trainer, name, flushed.get(name, {}), None)
        self._write_outputs(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._reports:
            self._write_outputs(trainer, pl_module)
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    @property
    @override
    def state_key(self) -> str:
        # Several monitors may have different settings.
        return self._generate_state_key(
            layers=self.layers,
            picture=self.picture is not None,
            table=self.table,
            # Left out where there is none, so that checkpoints from before there were reports load.
            **({} if self.report is None else {"report": True}),
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        # The history is large, and only needed for the plot, the table and the report.
        return {"history": self._history.state_dict()} if self._keeps_history else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "history" in state_dict:
            self._history.load_state_dict(state_dict["history"])

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes | list[Axes]]:
        """Plot the statistics logged so far, or in the last run.

        Args:
            ax: Axes to draw only the heatmap in; None creates a figure with heatmap and lines.

        Returns:
            The figure, and one or two axes that were drawn in.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            ValueError: If nothing was logged in this process.
        """
        return plot_history(self._history) if ax is None else plot_trust_ratios(self._history, ax)

    @property
    def _keeps_history(self) -> bool:
        return self.picture is not None or self.report is not None or self.table

    def _flush(self, trainer: Trainer) -> dict[str, dict[str, dict[str, OverSteps]]]:
        """Return the statistics of each optimizer that has any, and add them to the history."""
        flushed = {name: of for name, report in self._reports.items() if (of := report.statistics.flush())}
        of_all: dict[str, dict[str, OverSteps]] = {}
        for name, quantities in flushed.items():
            for quantity, layers in quantities.items():
                if quantity not in FOR_ALERTS:
                    prefixed = {f"{name}{layer}": value for layer, value in layers.items()}
                    of_all.setdefault(quantity, {}).update(prefixed)
        if of_all:
            self._history.record(trainer.global_step, of_all)
        return flushed

    def _write_outputs(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write_outputs(
            trainer,
            pl_module,
            self._history,
            self._warnings,
            table=self.table,
            picture=self._picture,
            report=self._report,
        )

    def _detach(self) -> None:
        for report in self._reports.values():
            report.detach()
        self._reports.clear()

    def _warn_of(
        self,
        trainer: Trainer,
        optimizer: str,
        quantities: Mapping[str, Mapping[str, OverSteps]],
        total_steps: float | None,
    ) -> None:
        report = self._reports[optimizer]
        self._warn(optimizer, report.layer_warnings(quantities))
        if self.alerts:
            # A fast_dev_run is shorter than any warmup.
            checks_peak = not cast(Any, trainer).fast_dev_run
            self._warn(optimizer, report.rate_warnings(total_steps, checks_peak=checks_peak))

    def _warn(self, optimizer: str, messages: Iterable[str]) -> None:
        if self.alerts:
            for message in messages:
                text = f"{optimizer.rstrip('/')}: {message}" if optimizer else message
                self._warnings.append(text)
                rank_zero_warn(text)
