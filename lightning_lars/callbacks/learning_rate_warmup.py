"""Warms up the learning rate, on top of any schedule or none."""

import math
from typing import Any, Literal, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lars.learning_rate.curves import WARMUPS
from lightning_lars.rules import POSITIVE, POSITIVE_WHOLE, counted, is_number, require
from lightning_lars.trainer.callback import Callback
from lightning_lars.trainer.learning_rate_owner import LearningRateOwner
from lightning_lars.trainer.training_length import Beginning, steps_of_epochs, total_steps


class LearningRateWarmup(Callback):
    """Multiplies the learning rate of every step by a factor that rises to 1.

    Works with any optimizer and any scheduler, or none. ``group["lr"]`` is always the scheduler's value,
    except inside the step and where ``LearningRateMonitor`` reads it. The warmup counts the steps that each
    optimizer took, from 1: not batches, nor steps that a gradient scaler skipped, nor batches without a loss
    (:class:`~lightning_lars.learning_rate.optimizer_steps.OptimizerSteps`). A resumed run continues where it
    stopped; a second ``fit`` warms up its new optimizers within the remaining steps.

    Args:
        warmup_steps: Optimizer steps until the factor is 1, at least 1. Exactly one of the three must be
            given; under manual optimization, this one.
        warmup_epochs: The same in epochs, above 0; may be fractional.
        warmup_fraction: The same as a fraction of all steps of the run, in (0, 1].
        shape: The curve, as in :mod:`lightning_lars.learning_rate`.
        start_factor: Value at which the curve starts, in [0, 1]. None means 0, for shapes that can start at 0
            (linear, cosine).

    Raises:
        ValueError: If an argument breaks its rule.
        MisconfigurationException: At the start of training, if the warmup is longer than the run; if epochs
            or fractions are requested with an endless loader, or under manual optimization; if there are two
            warmups; if an optimizer has no learning rate, or takes steps that cannot be observed.

    Example:
        >>> from lightning import Trainer
        >>> from lightning_lars import LearningRateWarmup
        >>> trainer = Trainer(callbacks=[LearningRateWarmup(warmup_epochs=5)], accelerator="cpu")
    """

    def __init__(
        self,
        warmup_steps: int | None = None,
        warmup_epochs: float | None = None,
        warmup_fraction: float | None = None,
        shape: Literal["constant", "linear", "exponential", "cosine"] = "linear",
        start_factor: float | None = None,
    ) -> None:
        lengths = {
            "warmup_steps": warmup_steps,
            "warmup_epochs": warmup_epochs,
            "warmup_fraction": warmup_fraction,
        }
        given = {name: value for name, value in lengths.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"One of {list(lengths)} must be given, got {given or 'none'}")
        if warmup_steps is not None:
            warmup_steps = POSITIVE_WHOLE.checked_int("warmup_steps", warmup_steps)
        if warmup_epochs is not None:
            POSITIVE.check("warmup_epochs", warmup_epochs)
        if warmup_fraction is not None:
            holds = is_number(warmup_fraction) and 0 < warmup_fraction <= 1
            require("warmup_fraction", "in (0, 1]", warmup_fraction, holds)
        require("shape", f"one of {tuple(WARMUPS)}", shape, shape in tuple(WARMUPS))
        if start_factor is not None:
            holds = is_number(start_factor) and 0 <= start_factor <= 1
            require("start_factor", "in [0, 1]", start_factor, holds)
        if not start_factor and shape in ("constant", "exponential"):
            raise ValueError(
                f"start_factor must be above 0 with shape={shape!r}, got {start_factor!r}: the weights would "
                "not move; 0.1 is a common value"
            )
        self.warmup_steps = warmup_steps
        self.warmup_epochs = warmup_epochs
        self.warmup_fraction = warmup_fraction
        self.shape = shape
        self.start_factor = start_factor or 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # In every stage: each loads the callbacks of a checkpoint.
        LearningRateOwner.of(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        owner = LearningRateOwner.of(trainer, self)
        if pl_module.automatic_optimization:
            total = total_steps(trainer, owner.beginning)
            warmup_steps = self._length(trainer, total, owner.beginning)
            # A fast_dev_run is shorter than any warmup.
            if warmup_steps > total and not cast(Any, trainer).fast_dev_run:
                raise MisconfigurationException(
                    f"LearningRateWarmup would take {warmup_steps} of the {total:.0f} optimizer steps of the "
                    "run: shorten the warmup or train longer"
                )
        elif self.warmup_steps is not None:
            warmup_steps = self.warmup_steps
        else:
            raise MisconfigurationException(
                f"LearningRateWarmup({self._given()}) has no length in steps under manual optimization, "
                "where only the module knows how often it steps each optimizer: pass warmup_steps"
            )
        curve, start_factor = WARMUPS[self.shape], self.start_factor
        owner.adjust(
            "warmup",
            lambda group, step: {"lr": group["lr"] * curve(step, warmup_steps, start_factor)},
        )
        rank_zero_info(
            f"LearningRateWarmup: {self.shape}, from {start_factor:g} to 1 times the learning rate in "
            f"{counted(warmup_steps, 'optimizer step')}."
        )

    def _length(self, trainer: Trainer, total: float, beginning: Beginning) -> int:
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.warmup_epochs is not None:
            steps = steps_of_epochs(trainer, self.warmup_epochs, beginning)
        else:
            assert self.warmup_fraction is not None
            steps = self.warmup_fraction * total
        if math.isinf(steps):
            raise MisconfigurationException(
                f"LearningRateWarmup({self._given()}) has no length in steps, because the train loader or "
                "the run has no end, or the batch sizes follow the noise scale: pass warmup_steps, or set "
                "limit_train_batches or max_steps"
            )
        return max(1, round(steps))

    def _given(self) -> str:
        if self.warmup_epochs is not None:
            return f"warmup_epochs={self.warmup_epochs}"
        return f"warmup_fraction={self.warmup_fraction}"
