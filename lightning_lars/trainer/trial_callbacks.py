"""The callbacks of a short run: which take part, and the one that ends it."""

from collections.abc import Sequence
from typing import Any, cast

import rich
from lightning.pytorch import LightningModule, Trainer
from rich.progress import Progress
from typing_extensions import override

from lightning_lars.class_names import has_class_named
from lightning_lars.trainer.callback import Callback

# Callbacks that write, stop, print, or change settings, but take no part in how a step is computed.
_LEFT_OUT = (
    "BatchSizeFinder",
    "Checkpoint",
    "DeviceStatsMonitor",
    "EarlyStopping",
    "GradientNoiseScale",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelSummary",
    "ParamGroupSummary",
    "PreciseBatchNorm",
    "ProgressBar",
    "SaveConfigCallback",
    "ThroughputMonitor",
    "Timer",
    "TrustRatioMonitor",
)


def has_progress_bar(trainer: Trainer) -> bool:
    """Return whether a Trainer shows the progress of its runs."""
    return any(has_class_named(each, "ProgressBar") for each in cast(Any, trainer).callbacks)


def accumulates_by_callback(trainer: Trainer) -> bool:
    """Return whether a callback sets the accumulated batches, and so must be left to do so."""
    names = ("GradientAccumulationScheduler", "BatchSizeSchedule")
    return any(has_class_named(each, *names) for each in cast(Any, trainer).callbacks)


def is_left_out(callback: Any) -> bool:
    """Return whether a callback takes no part in a short run."""
    return has_class_named(callback, *_LEFT_OUT)


class StopAfterSteps(Callback):
    """Ends a fit after so many optimizer steps, and shows the progress until then.

    Args:
        max_steps: Optimizer steps of this fit, at least 0.
        description: The text beside the progress bar; None shows none.
    """

    def __init__(self, max_steps: int, description: str | None) -> None:
        self.max_steps = max_steps
        self.steps = 0
        """Optimizer steps of this fit so far."""
        self._description = description
        self._begin = 0
        self._progress: Progress | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The module may have brought callbacks of its own (configure_callbacks). A new list: Lightning is
        # iterating over the old one.
        kept = [each for each in cast(Any, trainer).callbacks if not is_left_out(each) or each in self._ours]
        cast(Any, trainer).callbacks = kept
        # Until training starts, the optimizers and schedules of the whole run are configured.
        own, accumulated = self._accumulated
        if own != accumulated:
            trainer.accumulate_grad_batches = own

    def attach(self, trainer: Trainer, others: Sequence[Any], accumulate_grad_batches: int) -> None:
        """Add this callback and others to a Trainer that has not run yet, and remove its lower limits.

        Args:
            trainer: The Trainer.
            others: The other callbacks.
            accumulate_grad_batches: Batches to accumulate when training starts. Schedules are still those of
                the Trainer's own.
        """
        # Last, because a setup hook may check what is accumulated.
        self._ours = [*others, self]
        self._accumulated = trainer.accumulate_grad_batches, accumulate_grad_batches
        trainer.accumulate_grad_batches = accumulate_grad_batches
        cast(Any, trainer).callbacks = [*cast(Any, trainer).callbacks, *self._ours]
        # Lightning would go on to the end of what these ask for.
        trainer.fit_loop.min_epochs = 0
        trainer.fit_loop.epoch_loop.min_steps = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own, accumulated = self._accumulated
        if own != accumulated:
            trainer.accumulate_grad_batches = accumulated
        self._begin = trainer.global_step
        trainer.should_stop = self.max_steps == 0
        # These wait for metrics of a validation that does not run.
        configs = trainer.lr_scheduler_configs
        configs[:] = [each for each in configs if not each.reduce_on_plateau]
        console = rich.get_console()
        can_be_updated = console.is_terminal or console.is_jupyter
        if self._description is not None and trainer.is_global_zero and can_be_updated:
            self._progress = Progress(console=console, transient=True)
            self._progress.add_task(self._description, total=self.max_steps)
            self._progress.start()

    def count(self, trainer: Trainer) -> int:
        """Return the optimizer steps of this fit so far."""
        self.steps = trainer.global_step - self._begin
        return self.steps

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.count(trainer)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=self.steps)
        if self.steps >= self.max_steps:
            trainer.should_stop = True

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end_progress()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end_progress()

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
