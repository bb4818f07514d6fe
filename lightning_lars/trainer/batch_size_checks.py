"""Checks that a Trainer can follow the batch sizes of a ``BatchSizeSchedule``."""

import math
from collections.abc import Sequence
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_lars.class_names import has_class_named
from lightning_lars.rules import counted


def check_is_free(trainer: Trainer, pl_module: LightningModule) -> None:
    """Check that nothing but ``BatchSizeSchedule`` decides which batches a step accumulates.

    Raises:
        MisconfigurationException: If something else does.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "BatchSizeSchedule sets the batches that Lightning accumulates for a step, got "
            f"{type(pl_module).__name__} with automatic_optimization=False, where the module decides: use "
            "automatic optimization or remove the callback"
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            "BatchSizeSchedule sets accumulate_grad_batches, got Trainer(accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}): remove it from the Trainer"
        )
    for callback in cast(Any, trainer).callbacks:
        if has_class_named(callback, "GradientAccumulationScheduler"):
            raise MisconfigurationException(
                "BatchSizeSchedule and GradientAccumulationScheduler are mutually exclusive, because both "
                "set accumulate_grad_batches: remove one"
            )
        if has_class_named(callback, "LearningRateFinder"):
            raise MisconfigurationException(
                "BatchSizeSchedule and LearningRateFinder are mutually exclusive: the rate that is found is "
                "for a single micro-batch. Find it first, in a run with accumulate_grad_batches"
            )
    if trainer.strategy.handles_gradient_accumulation:
        raise MisconfigurationException(
            f"{type(trainer.strategy).__name__} accumulates gradients by itself, a number of batches that is "
            "fixed when training starts: use another strategy, such as 'fsdp', or remove BatchSizeSchedule"
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            "BatchSizeSchedule needs to know the batches of each step, got a training_step that fetches them "
            "from dataloader_iter: take batch and batch_idx instead, or remove the callback"
        )


def check_noise_scale_is_measured(trainer: Trainer, noise_scale: float) -> None:
    """Check that a ``GradientNoiseScale`` measures and publishes what a schedule waits for.

    Args:
        trainer: The Trainer, before its run.
        noise_scale: The argument of ``BatchSizeSchedule``.

    Raises:
        MisconfigurationException: If there is none, or if Lightning never logs.
    """
    if not any(has_class_named(each, "GradientNoiseScale") for each in cast(Any, trainer).callbacks):
        raise MisconfigurationException(
            f"BatchSizeSchedule(noise_scale={noise_scale}) needs a measured noise scale: add "
            "GradientNoiseScale() to the callbacks, or remove noise_scale"
        )
    if trainer.barebones or not cast(Any, trainer).log_every_n_steps:
        raise MisconfigurationException(
            f"BatchSizeSchedule(noise_scale={noise_scale}) reads the noise scale when Lightning logs, got a "
            "Trainer that never does: set log_every_n_steps above 0, without barebones, or remove noise_scale"
        )


def check_has_micro_batches(
    batch_sizes: Sequence[int], noise_scale: float, per_device: int, replicas: int
) -> None:
    """Check that every step has the two micro-batches that the noise scale is measured from.

    Args:
        batch_sizes: The scheduled effective batch sizes.
        noise_scale: The argument of ``BatchSizeSchedule``.
        per_device: Per-device batch size.
        replicas: Data-parallel replicas.

    Raises:
        MisconfigurationException: If a step on a single device has one.
    """
    smallest = min(batch_sizes)
    if replicas == 1 and smallest < 2 * per_device:
        raise MisconfigurationException(
            f"BatchSizeSchedule(noise_scale={noise_scale}) needs two or more micro-batches per step "
            f"to measure the noise scale on one device, got a batch size of {smallest}, and "
            f"{per_device} per device: halve the loader's batch size, or start with twice as much"
        )


def check_multiples(batch_sizes: Sequence[int], per_device: int, replicas: int) -> None:
    """Check that effective batch sizes are multiples of a batch on all replicas.

    Args:
        batch_sizes: The scheduled effective batch sizes.
        per_device: Per-device batch size.
        replicas: Data-parallel replicas.

    Raises:
        MisconfigurationException: If one is not.
    """
    samples = per_device * replicas
    refused = sorted({size for size in batch_sizes if size % samples})
    if refused:
        raise MisconfigurationException(
            f"BatchSizeSchedule needs effective batch sizes that are multiples of {samples} = {per_device} "
            f"per device x {counted(replicas, 'replica')}, got {refused}: schedule multiples of it, or set "
            "a per-device batch size that divides them all, at most "
            f"{counted(math.gcd(*batch_sizes), 'sample')} on all replicas together"
        )


def warn_of_short_epochs(trainer: Trainer, largest: int, samples_per_batch: int) -> None:
    """Warn if an epoch has fewer samples than the largest scheduled batch size."""
    samples = trainer.num_training_batches * samples_per_batch
    if largest > samples and not cast(Any, trainer).fast_dev_run:
        rank_zero_warn(
            f"BatchSizeSchedule schedules a batch size of {largest}, and an epoch has "
            f"{counted(int(samples), 'sample')}: Lightning steps when an epoch ends, so no batch is larger "
            "than that"
        )
