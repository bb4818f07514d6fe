"""Checks that a Trainer's strategy and settings are compatible with LARS and LAMB."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_lars.class_names import has_class_named
from lightning_lars.combined.combined_optimizer import parts_of
from lightning_lars.optim.layerwise import LayerwiseOptimizer


def check_strategy(module: LightningModule, optimizer: Optimizer) -> None:
    """Raise if the strategy hides the layers from LARS or LAMB; warn if gradients are clipped twice.

    Does nothing for other optimizers, and for a module without a Trainer.

    Raises:
        MisconfigurationException: If DeepSpeed ZeRO would replace the layers by one flat tensor.
    """
    layerwise = [each for each in parts_of([optimizer]) if isinstance(each, LayerwiseOptimizer)]
    if not layerwise:
        return
    try:
        trainer = module.trainer
    except RuntimeError:  # not attached to one
        return
    stage = _zero_stage(trainer.strategy)
    if stage:
        raise MisconfigurationException(
            f"{type(layerwise[0]).__name__} cannot compute the norms of layers under DeepSpeed ZeRO stage "
            f"{stage}, which flattens them into one tensor. Use stage=0, strategy='fsdp', "
            "ModelParallelStrategy, or strategy='ddp' with ZeroRedundancyOptimizer"
        )
    # Fabric, with which LightningModules can train too, has no such setting.
    gradient_clip_val = getattr(trainer, "gradient_clip_val", None)
    for each in layerwise:
        max_grad_norm = each.param_groups[0]["max_grad_norm"]
        if gradient_clip_val and max_grad_norm is not None:
            rank_zero_warn(
                f"gradients are clipped twice: by Trainer(gradient_clip_val={gradient_clip_val!r}) and by "
                f"{type(each).__name__}(max_grad_norm={max_grad_norm!r}). Use only one of them"
            )


def _zero_stage(strategy: Any) -> int:
    if not has_class_named(strategy, "DeepSpeedStrategy"):
        return 0
    return int(strategy.config.get("zero_optimization", {}).get("stage", 0))
