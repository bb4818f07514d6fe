"""The number of optimizer steps that a Trainer will take, and schedules that depend on it."""

import math
from typing import Any, Literal, NamedTuple, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_lars.class_names import has_class_named
from lightning_lars.learning_rate.warmup_decay import WarmupDecayLR
from lightning_lars.trainer.batch_size import accumulated_batches


class Beginning(NamedTuple):
    """A Trainer's progress when its optimizers and schedulers were created; a second fit creates new ones."""

    epoch: int
    step: int


_FIRST_FIT = Beginning(epoch=0, step=0)


def steps_of_epochs(trainer: Trainer, epochs: float, beginning: Beginning = _FIRST_FIT) -> float:
    """Return the optimizer steps of a (fractional) number of epochs; ``inf`` if that is unknown.

    That is, if an epoch has no end, or if its batch sizes follow the gradient noise scale. Follows a
    ``GradientAccumulationScheduler`` or a ``BatchSizeSchedule``. Loads the train loader if necessary, so
    under a distributed strategy every rank must call this.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    if math.isinf(trainer.num_training_batches) or math.isinf(epochs):
        return math.inf
    whole = math.floor(epochs)
    steps = _steps_per_epoch(trainer, whole + 1, beginning)
    if math.inf in steps:
        return math.inf
    return sum(steps[:whole]) + (epochs - whole) * steps[whole]


def total_steps(trainer: Trainer, beginning: Beginning = _FIRST_FIT) -> float:
    """Return the optimizer steps from a beginning to the end of the run; ``inf`` if it has no end.

    Unlike ``trainer.estimated_stepping_batches``, respects a ``GradientAccumulationScheduler`` or a
    ``BatchSizeSchedule``, and ``max_steps`` with an infinite loader.
    """
    max_epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = steps_of_epochs(trainer, max(0, max_epochs - beginning.epoch), beginning)
    return steps if trainer.max_steps == -1 else min(steps, max(0, trainer.max_steps - beginning.step))


def _steps_per_epoch(trainer: Trainer, epochs: int, beginning: Beginning) -> list[float]:
    for callback in cast(Any, trainer).callbacks:
        # BatchSizeSchedule changes the accumulated batches within an epoch.
        if hasattr(callback, "steps_per_epoch"):
            return list(callback.steps_per_epoch(trainer, epochs, beginning.step))
    # Lightning steps on the last batch of an epoch, however many have been accumulated by then.
    return [
        math.ceil(trainer.num_training_batches / accumulated_batches(trainer, epoch))
        for epoch in range(beginning.epoch, beginning.epoch + epochs)
    ]


def scheduler_config(
    module: LightningModule, scheduler: Any, interval: Literal["step", "epoch"] | None = None
) -> dict[str, Any]:
    """Return a scheduler's config for ``configure_optimizers``, with its length and interval set.

    Args:
        module: The module that configures its optimizers, for a Trainer, Fabric, or a custom loop.
        scheduler: Any scheduler. A :class:`~lightning_lars.WarmupDecayLR` without ``total_steps`` gets
            the steps of the run.
        interval: When the scheduler steps. None means each optimizer step for ``WarmupDecayLR``, else each
            epoch, Lightning's default.

    Raises:
        ValueError: If a ``WarmupDecayLR`` is to step once per epoch.
        MisconfigurationException: If ``total_steps`` is needed and unknown: without a Trainer, under manual
            optimization, or if the run has no end.
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
    # Lightning's own ReduceLROnPlateau names the metric that it monitors.
    return config | ({"monitor": scheduler.monitor} if hasattr(scheduler, "monitor") else {})


def _fill_in_length(module: LightningModule, scheduler: WarmupDecayLR) -> None:
    trainer = trainer_of(module)
    if trainer is None:
        raise MisconfigurationException(
            "WarmupDecayLR needs total_steps without a Trainer, under Fabric or in a custom loop: pass the "
            "number of optimizer steps of the whole run"
        )
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "WarmupDecayLR needs total_steps under manual optimization, where only the module knows how "
            "often it steps its optimizer: pass it"
        )
    if trainer.limit_train_batches == 0:
        return  # there will be no steps
    settings = cast(Any, trainer)
    # A second fit of the same Trainer has a new scheduler, and only the remaining steps.
    is_resumed = settings.ckpt_path is not None
    beginning = _FIRST_FIT if is_resumed else Beginning(trainer.current_epoch, trainer.global_step)
    steps = total_steps(trainer, beginning)
    if steps == 0:
        return
    if math.isinf(steps):
        raise MisconfigurationException(
            "WarmupDecayLR needs total_steps where the run has no end, or its batch sizes follow the noise "
            "scale: pass it, or set max_steps, or max_epochs and limit_train_batches"
        )
    if settings.fast_dev_run:
        # A dry run, shorter than any schedule.
        steps = max(steps, max((scheduler.warmup_steps, *scheduler.milestones)) + 1)
    if any(_changes_steps(callback) for callback in settings.callbacks):
        rank_zero_warn(
            f"WarmupDecayLR is given total_steps={steps:.0f} before BatchSizeFinder changes the number of "
            "steps: find the batch size in a separate run, or pass total_steps"
        )
    scheduler.set_total_steps(int(steps), beginning.step)


def _changes_steps(callback: Any) -> bool:
    # Tuner.scale_batch_size uses a finder that ends the fit early, which only a private attribute shows.
    is_finder = has_class_named(callback, "BatchSizeFinder")
    return is_finder and not getattr(callback, "_early_exit", False)


def _warmup_decays(scheduler: Any) -> list[WarmupDecayLR]:
    """Return the schedulers that count steps, including those nested in SequentialLR and ChainedScheduler."""
    if isinstance(scheduler, WarmupDecayLR):
        return [scheduler]
    return [each for inner in getattr(scheduler, "_schedulers", ()) for each in _warmup_decays(inner)]


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the Trainer of a module, or None without one: under Fabric, or in a custom loop."""
    try:
        trainer = module.trainer
    except RuntimeError:  # not attached to one
        return None
    # Fabric's stand-in only has Fabric's attributes.
    return trainer if hasattr(trainer, "fit_loop") else None
