"""How many optimizer steps a Trainer will take, and schedules that are told so."""

import math
from typing import Any, Literal, NamedTuple, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_lars.class_names import has_class_named
from lightning_lars.learning_rate.warmup_decay import WarmupDecayLR
from lightning_lars.trainer.batch_size import accumulated_batches


class Beginning(NamedTuple):
    """Where a Trainer stood as its optimizers and schedulers began; a second fit of it builds new ones."""

    epoch: int
    step: int


_FIRST_FIT = Beginning(epoch=0, step=0)


def steps_of_epochs(trainer: Trainer, epochs: float, beginning: Beginning = _FIRST_FIT) -> float:
    """Return the optimizer steps of the first epochs, a part of one included; ``inf`` if one has no end.

    Follows a ``GradientAccumulationScheduler``. Loads the train loader where that has not happened, so
    under a distributed strategy every process must call it.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    if math.isinf(trainer.num_training_batches) or math.isinf(epochs):
        return math.inf
    first, whole = beginning.epoch, math.floor(epochs)
    steps = float(sum(_steps_of_epoch(trainer, epoch) for epoch in range(first, first + whole)))
    return steps + (epochs - whole) * _steps_of_epoch(trainer, first + whole)


def total_steps(trainer: Trainer, beginning: Beginning = _FIRST_FIT) -> float:
    """Return the optimizer steps from a beginning to the end of the training; ``inf`` if it has no end.

    Unlike ``trainer.estimated_stepping_batches``, knows of a ``GradientAccumulationScheduler``, and of
    ``max_steps`` with a loader without end.
    """
    max_epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = steps_of_epochs(trainer, max(0, max_epochs - beginning.epoch), beginning)
    return steps if trainer.max_steps == -1 else min(steps, max(0, trainer.max_steps - beginning.step))


def _steps_of_epoch(trainer: Trainer, epoch: int) -> int:
    # Lightning steps on the last batch of an epoch, whatever has been accumulated by then.
    return math.ceil(trainer.num_training_batches / accumulated_batches(trainer, epoch))


def scheduler_config(
    module: LightningModule, scheduler: Any, interval: Literal["step", "epoch"] | None = None
) -> dict[str, Any]:
    """Return what ``configure_optimizers`` returns for a scheduler, with its length and interval filled in.

    Args:
        module: The module that configures its optimizers, for a Trainer, Fabric, or a loop of its own.
        scheduler: Any scheduler. A :class:`~lightning_lars.WarmupDecayLR` without
            ``total_steps`` gets those of the training.
        interval: When the scheduler steps. None stands for what it counts: optimizer steps for
            ``WarmupDecayLR``, else epochs, as Lightning does.

    Raises:
        ValueError: If a ``WarmupDecayLR`` is to step once an epoch.
        MisconfigurationException: If ``total_steps`` is to be filled in and nobody knows it: without a
            Trainer, under manual optimization, or if the training has no end.
    """
    counting = _warmup_decays(scheduler)
    if counting and interval == "epoch":
        raise ValueError(
            'lr_scheduler_interval must be "step" with WarmupDecayLR, which counts steps, got "epoch"'
        )
    for each in counting:
        if each.total_steps is None:
            _fill_in_length(module, each)
    config = {"scheduler": scheduler, "interval": interval or ("step" if counting else "epoch")}
    # Lightning's own ReduceLROnPlateau names what it watches.
    return config | ({"monitor": scheduler.monitor} if hasattr(scheduler, "monitor") else {})


def _fill_in_length(module: LightningModule, scheduler: WarmupDecayLR) -> None:
    trainer = trainer_of(module)
    if trainer is None:
        raise MisconfigurationException(
            "WarmupDecayLR needs total_steps where no Trainer knows it, under Fabric or in a loop of your "
            "own: pass it, the optimizer steps of the whole training"
        )
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "WarmupDecayLR needs total_steps under manual optimization, where only the module knows how "
            "often it steps its optimizer: pass it"
        )
    if trainer.limit_train_batches == 0:
        return  # no step will be taken
    settings = cast(Any, trainer)
    # A second fit of the same Trainer has a new scheduler, and the steps that the first one left.
    is_resumed = settings.ckpt_path is not None
    beginning = _FIRST_FIT if is_resumed else Beginning(trainer.current_epoch, trainer.global_step)
    steps = total_steps(trainer, beginning)
    if steps == 0:
        return
    if math.isinf(steps):
        raise MisconfigurationException(
            "WarmupDecayLR needs total_steps where the training has no end: pass it, or set max_steps, "
            "or max_epochs and limit_train_batches"
        )
    if settings.fast_dev_run:
        # A trial of the code, shorter than any schedule.
        steps = max(steps, max((scheduler.warmup_steps, *scheduler.milestones)) + 1)
    if any(_changes_steps(callback) for callback in settings.callbacks):
        rank_zero_warn(
            f"WarmupDecayLR is given total_steps={steps:.0f} before BatchSizeFinder changes how many steps "
            "there are: find the batch size in a run of its own, or pass total_steps"
        )
    scheduler.set_total_steps(int(steps), beginning.step)


def _changes_steps(callback: Any) -> bool:
    # Tuner.scale_batch_size has a finder that ends the fit by itself, which only a private attribute says.
    is_finder = has_class_named(callback, "BatchSizeFinder")
    return is_finder and not getattr(callback, "_early_exit", False)


def _warmup_decays(scheduler: Any) -> list[WarmupDecayLR]:
    """Return the schedulers that count steps, also those inside of SequentialLR and ChainedScheduler."""
    if isinstance(scheduler, WarmupDecayLR):
        return [scheduler]
    return [each for inner in getattr(scheduler, "_schedulers", ()) for each in _warmup_decays(inner)]


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the Trainer of a module, or None where it has none: under Fabric, or in a loop of its own."""
    try:
        trainer = module.trainer
    except RuntimeError:  # not attached to one
        return None
    # Fabric's stand-in has what Fabric has.
    return trainer if hasattr(trainer, "fit_loop") else None
