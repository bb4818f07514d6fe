"""Runs a module for a few steps at a small batch size, and reports what to expect of larger ones."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_lars.advice.report import Advice
from lightning_lars.advice.short_run import ShortRun
from lightning_lars.callbacks.gradient_noise_scale import GradientNoiseScale
from lightning_lars.class_names import has_class_named
from lightning_lars.learning_rate.batch_scaling import check_batch_size
from lightning_lars.rules import FLAG, WHOLE, require
from lightning_lars.trainer.trial_callbacks import StopAfterSteps, accumulates_by_callback, has_progress_bar
from lightning_lars.trainer.trial_run import run_trial

_UNKNOWN_EPOCHS = 1000
"""Lightning's own default, for schedules that need a length."""


def advise(
    model: LightningModule,
    train_dataloaders: Any = None,
    datamodule: Any = None,
    trainer: Trainer | None = None,
    *,
    max_steps: int = 300,
    batch_size: int | None = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    train_copy: bool = True,
) -> Advice:
    """Measure, in a short run at a small batch size, what a larger one would gain and need.

    The critical batch size is the gradient noise scale, as :class:`~lightning_lars.GradientNoiseScale`
    measures it at every step, averaged over about the last third of them.

    A copy of the module trains, with a copy of the Trainer, in the schedule of the whole run. The module, the
    Trainer and the global random state stay as they were, also if the run fails; two calls in a row see the
    same random numbers, unless a loader has its own generator, whose state advances. A data module is copied
    as by ``copy.copy``. Loggers and checkpoints, and callbacks that stop the run, are left out, and there is
    no validation.

    Only one rank and ``accumulate_grad_batches=1`` give no gradients of two batch sizes: the copy then
    accumulates two batches.

    Args:
        model: The module, with automatic optimization and a loss that is a mean over samples.
        train_dataloaders: As in ``Trainer.fit``.
        datamodule: As in ``Trainer.fit``.
        trainer: A Trainer as for the whole run, which has not run yet. None means one device and Lightning's
            defaults, a run of 1,000 epochs among them, whose steps are not reported. Its progress bar is
            replaced by one of the short run.
        max_steps: Optimizer steps, at least 0. At 0, nothing is measured: the report is of the groups, the
            memory and the rules.
        batch_size: Samples in a micro-batch. None reads it from the train loader or, where that has none,
            from the first batch.
        ckpt_path: The file of a checkpoint of the whole run to measure from.
        weights_only: As in ``Trainer.fit`` (Lightning 2.6), how to load the checkpoint.
        train_copy: False trains the module itself, for modules that ``copy.deepcopy`` cannot copy, and
            restores its ``state_dict``, and nothing else, at the end.

    Returns:
        What was measured and what it means. ``print()`` shows tables, ``to_json()`` returns JSON.

    Raises:
        ValueError: If an argument breaks its rule, or the Trainer has run, or has no steps to take.
        TypeError: If ``model`` or ``trainer`` has the wrong type, or cannot be copied.
        MisconfigurationException: If :class:`~lightning_lars.GradientNoiseScale` cannot measure: manual
            optimization, a strategy that shards, or a module without an optimizer.

    Example:
        >>> import torch
        >>> from lightning import LightningModule
        >>> from lightning_lars import advise
        >>> class Net(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(4, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return (self.layer(batch) - 1).pow(2).mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters(), lr=0.01)
        >>> loader = torch.utils.data.DataLoader(torch.randn(256, 4), batch_size=8)
        >>> advice = advise(Net(), loader, max_steps=8)
        >>> advice.batch_size, advice.measured_steps, advice.state_bytes["Adam"]
        (8, 8, 48)
        >>> advice.batch_sizes[2].batch_size, advice.batch_sizes[2].lr_sqrt
        (32, 0.02)
    """
    max_steps = WHOLE.checked_int("max_steps", max_steps)
    FLAG.check("train_copy", train_copy)
    if batch_size is not None:
        batch_size = check_batch_size("batch_size", batch_size)
    by_name = ("best", "last", "hpc")  # among those of callbacks that are left out
    require("ckpt_path", f"a file, and none of {by_name}", ckpt_path, ckpt_path not in by_name)
    # By name, because lightning.pytorch and pytorch_lightning each define both.
    for argument, value, kind in (("model", model, "LightningModule"), ("trainer", trainer, "Trainer")):
        unwrapped = getattr(value, "_orig_mod", value)  # what torch.compile has wrapped
        if not has_class_named(unwrapped, kind) and value is not None:
            raise TypeError(f"{argument} must be a {kind}, got {value!r}")
    knows_length = trainer is not None
    if trainer is None:
        trainer = Trainer(devices=1, max_epochs=_UNKNOWN_EPOCHS, logger=False)
    accumulated = trainer.accumulate_grad_batches
    needs_two = trainer.world_size == 1 and accumulated == 1 and not accumulates_by_callback(trainer)
    measures = max_steps > 0
    noise_scale = GradientNoiseScale(1, max(0.0, 1 - 3 / max_steps), batch_size) if measures else None
    stop = StopAfterSteps(max_steps, "Measuring the noise scale" if has_progress_bar(trainer) else None)
    watch = ShortRun(noise_scale, stop, batch_size, knows_length=knows_length)
    try:
        run_trial(
            trainer,
            model,
            stop,
            [watch] if noise_scale is None else [noise_scale, watch],
            train_dataloaders=train_dataloaders,
            datamodule=datamodule,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
            accumulate_grad_batches=2 if needs_two and measures and model.automatic_optimization else None,
            train_copy=train_copy,
        )
    except MisconfigurationException as error:
        if "GradientNoiseScale" not in str(error):
            raise
        raise MisconfigurationException(
            f"advise measures with a callback that cannot measure here. {error}. Or pass max_steps=0, which "
            "reports everything else without training"
        ) from error
    if not watch.has_begun or (measures and not stop.steps):
        raise ValueError(
            "trainer must have steps to take, got one without (limit_train_batches=0, max_steps=0), or a "
            "ckpt_path from the end of its run: raise its limits, or pass max_steps=0 to advise"
        )
    return watch.advice()
