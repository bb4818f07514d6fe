"""Measures the critical batch size while training, and interprets it for the current batch size."""

from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lars.gradients.backward_norms import BackwardNorms
from lightning_lars.gradients.noise_scale import MovingNoiseScale, NoiseScale, describe, two_batch_estimates
from lightning_lars.learning_rate.batch_scaling import check_batch_size
from lightning_lars.rules import FRACTION, POSITIVE_WHOLE
from lightning_lars.trainer.batch_size import effective_batch_size
from lightning_lars.trainer.callback import Callback
from lightning_lars.trainer.logging import is_logging, log, publish
from lightning_lars.trainer.micro_batch_gradients import check_micro_batch_gradients, squared_norms
from lightning_lars.trainer.micro_batches import MicroBatches


class GradientNoiseScale(Callback):
    """Logs the gradient noise scale of McCandlish et al. 2018, an estimate of the critical batch size.

    ::

        B_simple = tr_sigma / squared_gradient
        steps    = fewest steps   * (1 + B_simple / batch size)
        samples  = fewest samples * (1 + batch size / B_simple)

    Far below it, twice the batch takes half the steps; far above it, a larger batch barely saves any. It
    grows during training. When training ends, a log message interprets it for the current batch size.

    It is estimated from the gradients of a micro-batch and of the whole step, by
    :func:`~lightning_lars.gradients.noise_scale.two_batch_estimates`. A micro-batch is the input of one
    backward pass on one rank: with accumulation, under DDP, or with both, a step has several. The loss must
    be a mean over samples. All differences between micro-batches count as noise: dropout, the statistics of
    batch normalization, the negatives of contrastive losses.

    Steps with a non-finite gradient, with a single micro-batch, or with micro-batches of unequal size are not
    measured. Where batches do not show their size (no tensor has it as its first dimension), all but the last
    of an epoch are assumed to be full. Gradients are those before clipping.

    A measured step reads its gradients once more in each backward pass, and once when they are complete; DDP
    all-reduces three numbers. They are copied to the host only when Lightning logs.

    Args:
        every_n_steps: Optimizer steps from one measurement to the next, at least 1.
        decay: Fraction of its weight that a measurement keeps at the next one, from 0 to below 1: 0.99
            averages over about the last hundred.
        batch_size: Samples in a micro-batch. None reads it from the train loader or, where that has none,
            from the first batch.

    ================================================  =================================================
    Key                                               Value
    ================================================  =================================================
    ``gradient_noise_scale/B_simple``                 Noise scale, in samples
    ``gradient_noise_scale/B_simple_standard_error``  Its standard error; counts a drift as noise
    ``gradient_noise_scale/batch_size_to_B_simple``   Effective batch size / ``B_simple``
    ``gradient_noise_scale/tr_sigma``                 Trace of the covariance of the gradient of a sample
    ``gradient_noise_scale/squared_gradient``         Squared norm of the gradient without noise
    ================================================  =================================================

    ``tr_sigma`` and ``squared_gradient`` are moving averages, ``B_simple`` is their quotient. Where one of
    them is not above 0, it is lost in the other, and the first three are omitted. All are also in
    ``trainer.callback_metrics``, from the first log on, and when training ends; omitted keys keep their last
    values there.

    Raises:
        ValueError: If an argument breaks its rule.
        MisconfigurationException: At the start of a fit, if a step has a single micro-batch, in manual
            optimization, without an optimizer, or under a strategy that hides the gradient of a single rank
            (FSDP, ``ModelParallelStrategy``, DeepSpeed); at the first batch, if no batch size can be found.

    Example:
        >>> import lightning
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_lars.callbacks.gradient_noise_scale import GradientNoiseScale
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> quiet |= dict(enable_model_summary=False, accelerator="cpu", devices=1)
        >>> noise_scale = GradientNoiseScale(every_n_steps=1)
        >>> trainer = lightning.Trainer(
        ...     max_steps=16, accumulate_grad_batches=4, callbacks=[noise_scale], **quiet
        ... )
        >>> trainer.fit(BoringModel())
        >>> bool(trainer.callback_metrics["gradient_noise_scale/tr_sigma"] > 0)
        True
    """

    def __init__(self, every_n_steps: int = 10, decay: float = 0.99, batch_size: int | None = None) -> None:
        self.every_n_steps = POSITIVE_WHOLE.checked_int("every_n_steps", every_n_steps)
        FRACTION.check("decay", decay)
        if batch_size is not None:
            batch_size = check_batch_size("batch_size", batch_size)
        self.decay = decay
        self.batch_size = batch_size
        self._moving = MovingNoiseScale(decay)
        self._micro_batches = MicroBatches(batch_size)
        self._norms: BackwardNorms | None = None
        # Of the current batch, and of all batches in the step.
        self._is_full = self._all_full = self._had_backward = False
        self._effective_batch_size: int | None = None
        self._has_stepped = self._has_news = False

    def read(self) -> NoiseScale | None:
        """Return the averages so far, in one device-to-host copy; None before the first measurement."""
        return self._moving.read()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_micro_batch_gradients(trainer, pl_module)
            self._moving = MovingNoiseScale(self.decay)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(optimizer.param_groups for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                "GradientNoiseScale measures the gradients that an optimizer steps with, got no optimizer: "
                "return one from configure_optimizers or remove the callback"
            )
        self._micro_batches.reset()
        self._effective_batch_size = None
        self._has_stepped = self._has_news = False

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._micro_batches.reset()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._had_backward = False
        self._is_full = self._is_due(trainer) and self._micro_batches.is_full(trainer, batch)

    @override
    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._stop_watching()
        if self._is_due(trainer):
            params = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
            self._norms = BackwardNorms(params)
            self._all_full = True

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._had_backward = True
        if self._norms is not None:
            self._norms.end_pass()
            self._all_full &= self._is_full

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._has_stepped = True
        norms = self._stop_watching()
        if norms is None or not norms.squares:
            return
        # If the last batch has no loss, Lightning does not unscale the gradients.
        is_sound = self._all_full and self._had_backward and not norms.in_parts
        if trainer.world_size == 1 and (len(norms.squares) == 1 or not is_sound):
            return
        small, big = squared_norms(trainer, norms, optimizer)
        shared = torch.stack([small, big, torch.full_like(small, is_sound)])
        if trainer.world_size > 1:
            torch.distributed.all_reduce(shared)
            shared = shared / trainer.world_size
        # All ranks end up with the same gradient, unless a communication hook does not average it.
        counts = (shared[2] == 1) & ((shared[1] - big).abs() <= 1e-6 * big)
        size = self._micro_batches.size
        big_batch = size * len(norms.squares) * trainer.world_size
        self._moving.update(*two_batch_estimates(shared[0], shared[1], size, big_batch), counts)
        self._effective_batch_size = effective_batch_size(trainer, size)
        self._has_news = True

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Lightning logs on every batch that is accumulated for a step; the step is in the last one.
        stepped, self._has_stepped = self._has_stepped, False
        if stepped and self._has_news and is_logging(trainer):
            self._has_news = False
            metrics = self._metrics(self._moving.read())
            log(trainer, metrics)
            publish(trainer, metrics)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured = self._moving.read()
        if measured is not None and self._effective_batch_size is not None:
            publish(trainer, self._metrics(measured))
            rank_zero_info(f"GradientNoiseScale: {describe(measured, self._effective_batch_size)}.")
        elif not cast(Any, trainer).fast_dev_run:
            rank_zero_warn(
                f"GradientNoiseScale measured no step. One in every_n_steps={self.every_n_steps} is "
                "measured, if its gradients are finite, equal on all ranks, and from two or more "
                "micro-batches of one size, and if Lightning takes the step: optimizer.step() of the "
                "optimizer that it passes to optimizer_step, not of optimizer.optimizer. Train for longer, "
                "lower every_n_steps, or set drop_last=True in the train loader"
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_watching()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_watching()
        # Move the state to the host, where it stays available for a checkpoint.
        self._moving = MovingNoiseScale(self.decay, self._moving.state())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"moving": self._moving.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._moving = MovingNoiseScale(self.decay, state_dict["moving"])

    def _is_due(self, trainer: Trainer) -> bool:
        return trainer.global_step % self.every_n_steps == 0

    def _stop_watching(self) -> BackwardNorms | None:
        norms, self._norms = self._norms, None
        if norms is not None:
            norms.remove()
        return norms

    def _metrics(self, measured: NoiseScale | None) -> dict[str, float]:
        if measured is None or self._effective_batch_size is None:
            return {}
        b_simple = measured.b_simple
        metrics = {
            "B_simple": b_simple,
            "B_simple_standard_error": measured.standard_error,
            "batch_size_to_B_simple": self._effective_batch_size / b_simple if b_simple else None,
            "tr_sigma": measured.tr_sigma,
            "squared_gradient": measured.squared_gradient,
        }
        return {f"gradient_noise_scale/{key}": value for key, value in metrics.items() if value is not None}
