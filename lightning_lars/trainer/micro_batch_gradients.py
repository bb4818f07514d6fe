"""The gradients of micro-batches, as a Trainer computes them for a step."""

from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_lars.class_names import has_class_named
from lightning_lars.gradients.backward_norms import BackwardNorms


def check_micro_batch_gradients(trainer: Trainer, pl_module: LightningModule) -> None:
    """Check that a step has gradients of two batch sizes to compare.

    Raises:
        MisconfigurationException: If it has not, or if the strategy or the module hides them.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "GradientNoiseScale cannot know which backward passes belong to a step in manual optimization, "
            f"got {type(pl_module).__name__} with automatic_optimization=False: measure with automatic "
            "optimization or remove the callback"
        )
    averages_itself = has_class_named(trainer.strategy, "DeepSpeedStrategy", "XLAStrategy")
    if averages_itself or not has_class_named(trainer.strategy, "SingleDeviceStrategy", "DDPStrategy"):
        raise MisconfigurationException(
            "GradientNoiseScale needs the gradient of a single rank before it is averaged, which "
            f"{type(trainer.strategy).__name__} hides: measure in a shorter run with strategy='ddp', or on "
            "one device with accumulate_grad_batches=2 or more, or remove the callback"
        )
    accumulates = trainer.accumulate_grad_batches > 1 or any(
        # GradientAccumulationScheduler, of either package.
        each.going_to_accumulate_grad_batches()
        for each in cast(Any, trainer).callbacks
        if hasattr(each, "going_to_accumulate_grad_batches")
    )
    if trainer.world_size == 1 and not accumulates:
        raise MisconfigurationException(
            "GradientNoiseScale compares gradients of two batch sizes, got one rank and "
            "accumulate_grad_batches=1: set accumulate_grad_batches=2, with half the batch size to take the "
            "same steps, or use strategy='ddp' on several devices"
        )


def squared_norms(trainer: Trainer, norms: BackwardNorms, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
    """Return the squared norm of the gradient of a micro-batch, on average, and of the step.

    Both are of the mean over samples: the divisor of accumulation and the loss scale are taken out.

    Args:
        trainer: The Trainer, just before the optimizer step.
        norms: The norms of all backward passes of the step.
        optimizer: The optimizer that is about to step.

    Returns:
        Two 0-d tensors.
    """
    # Lightning divides the loss by this, even if an epoch ends with fewer batches.
    divisor = trainer.accumulate_grad_batches
    small = torch.stack(norms.squares).mean() * divisor**2
    big = norms.accumulated() * (divisor / len(norms.squares)) ** 2
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        loss_scale = scaler.scale(torch.ones_like(small))
        small = small / loss_scale**2
        # Lightning has unscaled p.grad by now, unless the optimizer does so in its step, like torch's fused
        # ones.
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            big = big / loss_scale**2
    return small, big
