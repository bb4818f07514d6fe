"""Changes the effective batch size during training."""

import math
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lars.learning_rate.batch_growth import growth
from lightning_lars.learning_rate.batch_scaling import check_batch_size
from lightning_lars.learning_rate.batch_schedule import BatchSizes, BatchSizesByNoiseScale, Progress
from lightning_lars.rules import counted
from lightning_lars.trainer.accumulation import AccumulatedBatches, give_back
from lightning_lars.trainer.batch_size import data_parallel_replicas, per_device_batch_size, takes_steps
from lightning_lars.trainer.batch_size_checks import (
    check_has_micro_batches,
    check_is_free,
    check_multiples,
    check_noise_scale_is_measured,
    warn_of_short_epochs,
)
from lightning_lars.trainer.callback import Callback
from lightning_lars.trainer.logging import is_logging

NOISE_SCALE = "gradient_noise_scale/B_simple"


class BatchSizeSchedule(Callback):
    """Changes the effective batch size during training, by the number of batches that a step accumulates.

    ::

        accumulated batches = scheduled batch size / (per-device batch size * data-parallel replicas)

    The schedule is one of three:

    - ``batch_sizes={0: 256, 1000: 1024}``: batch sizes by the step, or sample, from which on they apply;
    - ``start``, ``increment``, ``every``, ``end``: a ramp, as for large language models
      (:func:`~lightning_lars.learning_rate.additive_growth`);
    - ``start``, ``factor``, ``every``, ``end``: multiplication, such as doubling, in place of a decay of the
      learning rate (:func:`~lightning_lars.learning_rate.multiplicative_growth`).

    With ``noise_scale``, the schedule waits for the critical batch size: after the scheduled number of steps
    or samples at one batch size, the next one follows once ``B_simple`` is ``noise_scale`` times as large as
    that next one. The batch size never shrinks. A ``GradientNoiseScale`` beside it measures ``B_simple``, and
    publishes it whenever Lightning logs (``log_every_n_steps``). How many steps such a run takes is unknown
    beforehand.

    The loader stays as it is. The batch size changes after any step, in the middle of an epoch too, and each
    step is the mean over exactly its own batches. An epoch ends with a step over the batches that are left;
    where the loader has no length, Lightning divides their sum by the scheduled number of batches.

    ``BatchSizeScaling`` scales the learning rate by the batch size of each step, warmups and the mixin's
    ``total_steps`` count the steps of the schedule. ``trainer.estimated_stepping_batches`` does not:
    Lightning takes the accumulated batches to be constant. The batch size of each step is logged as
    ``batch_size/effective``, and shown by the progress bar.

    A resumed run continues the schedule, on any number of devices. As always in Lightning, a checkpoint has
    no gradients: if it was written between the batches of a step, the resumed run begins a new step.

    Args:
        batch_sizes: Effective batch sizes, by the number of steps or samples before them, one of which is 0.
        start: Effective batch size at first, in place of ``batch_sizes``.
        end: Effective batch size at last, at least ``start``.
        increment: Samples by which the batch size grows each time. Either this or ``factor``.
        factor: Whole number, at least 2, by which it is multiplied each time.
        every: Steps or samples from one time to the next.
        unit: What ``every`` and the keys of ``batch_sizes`` count: ``"steps"`` of the optimizer
            (``trainer.global_step``), or the ``"samples"`` of these steps on all devices, where each batch
            counts as full.
        batch_size: Per-device batch size. None reads it from the train loader.
        noise_scale: Least quotient of gradient noise scale and batch size, above 0: with 1, the batch size
            grows as far as the critical one. None grows by schedule alone.

    Raises:
        ValueError: If an argument breaks its rule; at the start of training, if the train loader has no batch
            size.
        MisconfigurationException: At the start of training, if a scheduled batch size is not a multiple of
            per-device batch size times replicas; with ``Trainer(accumulate_grad_batches=...)``, a
            ``GradientAccumulationScheduler``, or a ``LearningRateFinder``, which tries rates at a single
            batch size; in manual optimization; with a ``training_step`` that takes ``dataloader_iter``, or
            under DeepSpeed, which accumulates by itself; with ``noise_scale``, if no ``GradientNoiseScale``
            measures it, or if a step on a single device has one micro-batch.

    Example:
        >>> import lightning
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_lars import BatchSizeSchedule
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> quiet |= dict(enable_model_summary=False, accelerator="cpu", devices=1)
        >>> doubling = BatchSizeSchedule(start=1, factor=2, every=10, end=4)
        >>> trainer = lightning.Trainer(max_epochs=1, callbacks=[doubling], **quiet)
        >>> trainer.fit(BoringModel())  # on 64 samples: 10 steps of 1, 10 of 2, 8 of 4, and one of the last 2
        >>> trainer.global_step
        29
    """

    def __init__(
        self,
        batch_sizes: dict[int, int] | None = None,
        start: int | None = None,
        end: int | None = None,
        increment: int | None = None,
        factor: int | None = None,
        every: int | None = None,
        unit: Literal["steps", "samples"] = "steps",
        batch_size: int | None = None,
        noise_scale: float | None = None,
    ) -> None:
        if batch_size is not None:
            batch_size = check_batch_size("batch_size", batch_size)
        if batch_sizes is None:
            batch_sizes = growth(start, end, increment, factor, every)
        else:
            others = {"start": start, "end": end, "increment": increment, "factor": factor, "every": every}
            given = {name: value for name, value in others.items() if value is not None}
            if given:
                raise ValueError(
                    "batch_sizes must be given without start, end, every, increment and factor, got "
                    f"{given} too"
                )
        self.unit = unit
        self.batch_size = batch_size
        self.noise_scale = noise_scale
        self._schedule = BatchSizes(batch_sizes, unit)
        if noise_scale is not None:
            self._schedule = BatchSizesByNoiseScale(batch_sizes, unit, noise_scale)
        self._samples = self._samples_before_fit = 0
        self._steps_before = 0
        self._per_device, self._replicas = 1, 1
        # Batches of the latest step, and whether its gradients were lost, because a checkpoint has none.
        self._accumulated = AccumulatedBatches(1)
        self._is_lost = False
        self._scheduled: int | None = None
        self._has_logged = False
        self._is_fitting = self._is_loaded = False

    @property
    def batch_sizes(self) -> dict[int, int]:
        """The effective batch sizes, by the number of steps or samples before them."""
        return dict(self._schedule.batch_sizes)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_fitting = stage == "fit"
        self._is_loaded = False
        if self._is_fitting:
            check_is_free(trainer, pl_module)
            if self.noise_scale is not None:
                check_noise_scale_is_measured(trainer, self.noise_scale)
            if cast(Any, trainer).ckpt_path is None:
                # Before the module configures schedulers, which may ask for the steps of this fit.
                self._samples_before_fit = self._samples if trainer.global_step else 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Ahead of all that read the batch size of the next step, when a batch starts. A new list: Lightning
        # is iterating over the old one.
        others = [callback for callback in cast(Any, trainer).callbacks if callback is not self]
        cast(Any, trainer).callbacks = [self, *others]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scheduled, self._has_logged = None, False
        self._read_batch_size(trainer)
        warn_of_short_epochs(trainer, max(self.batch_sizes.values()), self._samples_per_batch)
        if trainer.global_step == 0:
            self._samples = 0
            self._schedule.load({})
        elif cast(Any, trainer).ckpt_path is not None and not self._is_loaded:
            # A checkpoint written without this callback: Lightning's own count is the best estimate.
            batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
            self._samples = batches * self._samples_per_batch
        if self._is_loaded:
            # Lightning asks whether the last batch before the checkpoint ended with a step.
            trainer.accumulate_grad_batches = self._accumulated
        else:
            self._begin_step(trainer, first=0)
        self._is_lost = True

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_batch_size(trainer)
        self._begin_step(trainer, first=0)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if takes_steps(trainer) and not isinstance(trainer.accumulate_grad_batches, AccumulatedBatches):
            raise MisconfigurationException(
                "BatchSizeSchedule sets accumulate_grad_batches, but something else has set it to "
                f"{trainer.accumulate_grad_batches} during training: leave it to one of the two"
            )
        if takes_steps(trainer) and (self._is_lost or batch_idx >= self._accumulated.end):
            self._begin_step(trainer, first=batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not takes_steps(trainer) or trainer.global_step == self._steps_before:
            return
        self._has_logged = is_logging(trainer)
        samples = (batch_idx + 1 - self._accumulated.first) * self._samples_per_batch
        self._samples += samples
        if not trainer.barebones:
            # A tensor on the CPU: on a GPU, a progress bar would wait for it at every step.
            pl_module.log("batch_size/effective", torch.tensor(float(samples)), prog_bar=True, batch_size=1)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        give_back(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        give_back(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": self._samples,
            "samples_before_fit": self._samples_before_fit,
            "accumulated": int(self._accumulated),
            "first": self._accumulated.first,
            "schedule": self._schedule.state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Validation of another checkpoint between two fits leaves the schedule where it is.
        if self._is_fitting:
            self._is_loaded = True
            self._samples = state_dict["samples"]
            self._samples_before_fit = state_dict["samples_before_fit"]
            self._schedule.load(state_dict["schedule"])
            self._accumulated = AccumulatedBatches(state_dict["accumulated"], state_dict["first"])

    def steps_per_epoch(self, trainer: Trainer, epochs: int, steps_before: int = 0) -> list[float]:
        """Return the optimizer steps of the next epochs, for a train loader that has a length.

        They are ``inf`` with ``noise_scale``, because their number is unknown beforehand.

        Args:
            trainer: A Trainer that is fitting.
            epochs: Number of epochs.
            steps_before: The steps before them: 0, or those before the current fit.
        """
        self._read_batch_size(trainer)
        if self.noise_scale is not None:
            return [math.inf] * epochs
        steps, progress = [], Progress(steps_before, self._samples_before_fit if steps_before else 0)
        for _ in range(epochs):
            before = progress.steps
            batches = int(trainer.num_training_batches)
            progress = self._schedule.epoch(progress, batches, self._samples_per_batch)
            steps.append(float(progress.steps - before))
        return steps

    @property
    def most_accumulated_batches(self) -> int:
        """The batches of the step with the largest scheduled batch size, once the fit has started."""
        return max(self.batch_sizes.values()) // self._samples_per_batch

    def going_to_accumulate_grad_batches(self) -> bool:
        """Return True, as a ``GradientAccumulationScheduler`` does: steps may have several micro-batches."""
        return True

    def _begin_step(self, trainer: Trainer, first: int) -> None:
        # Not at every step: on a GPU, Lightning waits for the metrics of the progress bar to return any.
        if self.noise_scale is not None and self._has_logged and NOISE_SCALE in trainer.callback_metrics:
            self._schedule.observe(trainer.callback_metrics[NOISE_SCALE].item())
        scheduled = self._schedule.after(Progress(trainer.global_step, self._samples))
        batches = min(scheduled // self._samples_per_batch, trainer.num_training_batches - first)
        self._accumulated = AccumulatedBatches(int(max(1, batches)), first)
        self._steps_before = trainer.global_step
        self._is_lost = False
        trainer.accumulate_grad_batches = self._accumulated
        if scheduled != self._scheduled:
            self._scheduled = scheduled
            position = trainer.global_step if self.unit == "steps" else self._samples
            rank_zero_info(
                f"BatchSizeSchedule: effective batch size {scheduled} = {self._per_device} per device x "
                f"{counted(self._replicas, 'replica')} x {scheduled // self._samples_per_batch} "
                f"accumulated, after {counted(position, self.unit.removesuffix('s'))}"
            )

    @property
    def _samples_per_batch(self) -> int:
        return self._per_device * self._replicas

    def _read_batch_size(self, trainer: Trainer) -> None:
        """Take the per-device batch size from the argument or the loader, and check the schedule with it."""
        self._per_device = self.batch_size or per_device_batch_size(trainer)
        self._replicas = data_parallel_replicas(trainer)
        sizes = list(self.batch_sizes.values())
        if self.noise_scale is not None:
            check_has_micro_batches(sizes, self.noise_scale, self._per_device, self._replicas)
        check_multiples(sizes, self._per_device, self._replicas)
