"""A short run of a Trainer and a module that leaves both, and the global random state, as they were."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.seed import isolate_rng
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
        kept = [each for each in cast(Any, trainer).callbacks if not _is_left_out(each) or each in self._ours]
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


def run_trial(
    trainer: Trainer,
    model: LightningModule,
    stop: StopAfterSteps,
    callbacks: Sequence[Any],
    *,
    train_dataloaders: Any = None,
    datamodule: Any = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    accumulate_grad_batches: int | None = None,
    train_copy: bool = True,
) -> None:
    """Fit a copy of a module with a copy of a Trainer, for a few steps, without validation.

    Loggers, and callbacks that write files, print or stop the run, are left out of the copy; all others
    train with it. Schedules are those of the whole run. A data module is copied as by ``copy.copy``.

    Args:
        trainer: A Trainer that has not run yet.
        model: The module.
        stop: Ends the run.
        callbacks: Added to the Trainer's own.
        train_dataloaders: As in ``Trainer.fit``.
        datamodule: As in ``Trainer.fit``.
        ckpt_path: As in ``Trainer.fit``.
        weights_only: As in ``Trainer.fit``, with Lightning 2.6.
        accumulate_grad_batches: Replaces the Trainer's; None keeps it.
        train_copy: False trains the module itself, and restores its ``state_dict`` at the end.

    Raises:
        ValueError: If the Trainer has run, is on fast_dev_run, or starts its processes from this one.
        TypeError: If ``copy.deepcopy`` cannot copy the Trainer or the module.
    """
    _check(trainer)
    # What is in here is replaced instead of copied.
    memo: dict[int, Any] = {id(logger): DummyLogger() for logger in trainer.loggers}
    memo |= {id(each): Callback() for each in cast(Any, trainer).callbacks if _is_left_out(each)}
    memo[id(cast(Any, trainer).profiler)] = PassThroughProfiler()
    attached = _trainer_of(model)
    if not train_copy:
        memo[id(model)] = model
    copied = _copy(trainer, "trainer", memo)
    if attached is not None:
        memo[id(attached)] = copied
    trained = _copy(model, "model", memo) if train_copy else model
    stop.attach(copied, callbacks, accumulate_grad_batches or copied.accumulate_grad_batches)
    cast(Any, copied).limit_val_batches = 0
    cast(Any, copied).num_sanity_val_steps = 0
    with _random_state_kept(), nullcontext() if train_copy else _restored(model), warnings.catch_warnings():
        # There is no validation, and the callbacks that the checkpoint has more are left out.
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
        warnings.filterwarnings("ignore", "You defined a `validation_step` but have no `val_dataloader`")
        copied.fit(
            trained,
            train_dataloaders=train_dataloaders,
            datamodule=copy.copy(datamodule),
            ckpt_path=ckpt_path,
            **({} if weights_only is None else {"weights_only": weights_only}),
        )


def _check(trainer: Trainer) -> None:
    if trainer.state.fn is not None:
        raise ValueError(
            "trainer must not have run yet, got one that has: pass a new Trainer with the same arguments"
        )
    if cast(Any, trainer).fast_dev_run:
        raise ValueError(
            "trainer must take more than the few steps of fast_dev_run, got "
            f"fast_dev_run={cast(Any, trainer).fast_dev_run!r}: remove it"
        )
    if has_class_named(trainer.strategy.launcher, "_MultiProcessingLauncher"):
        raise ValueError(
            "trainer must run in this process, got a strategy that starts others for every run (ddp_spawn, "
            "ddp_fork, ddp_notebook), in which the result would be lost: use devices=1, or strategy='ddp' in "
            "a script"
        )


def _is_left_out(callback: Any) -> bool:
    return has_class_named(callback, *_LEFT_OUT)


def _trainer_of(model: LightningModule) -> Trainer | None:
    try:
        return model.trainer
    except RuntimeError:  # not attached to one
        return None


def _copy(value: Any, argument: str, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        way_out = {
            "trainer": "Pass a Trainer whose callbacks and plugins can be copied",
            "model": "Give it a __deepcopy__, or pass train_copy=False, which trains the module itself and "
            "restores its state_dict",
        }
        raise TypeError(
            f"{argument} must be an object that copy.deepcopy can copy, got a {type(value).__name__} for "
            f"which it raises {type(error).__name__}: {error}. {way_out[argument]}"
        ) from error


@contextmanager
def _random_state_kept() -> Iterator[None]:
    raised = None
    with isolate_rng():
        # It restores nothing where an exception passes through it.
        try:
            yield
        except BaseException as error:
            raised = error
    if raised is not None:
        raise raised


@contextmanager
def _restored(model: LightningModule) -> Iterator[None]:
    attached, device = _trainer_of(model), model.device
    modes = {module: module.training for module in model.modules()}
    state = copy.deepcopy(model.state_dict())
    try:
        yield
    finally:
        model.load_state_dict(state, strict=False)  # configure_model may have added to it
        model.to(device)
        model.zero_grad()
        for module, mode in modes.items():
            module.training = mode
        cast(Any, model).trainer = attached
