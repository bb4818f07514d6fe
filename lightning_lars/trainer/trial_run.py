"""A short run of a Trainer and a module that leaves both, and the global random state, as they were."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_lars.class_names import has_class_named
from lightning_lars.trainer.callback import Callback
from lightning_lars.trainer.trial_callbacks import StopAfterSteps, is_left_out


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
    memo |= {id(each): Callback() for each in cast(Any, trainer).callbacks if is_left_out(each)}
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
