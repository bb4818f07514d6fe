"""Published recipes for linear probes of frozen models, and for fine-tuning."""

from functools import partial
from typing import NamedTuple

import torch

from lightning_lars.recipes.recipe import Recipe, linear_rule, recipe, row_of, steps_of
from lightning_lars.recipes.self_supervised import self_supervised_lars


def mae_linear_probing(batch_size: int = 16384, steps_per_epoch: int = 78) -> Recipe:
    """Linear probing of MAE (He et al. 2022, https://github.com/facebookresearch/mae, ``main_linprobe.py``).

    LARS with ``lr = 0.1 * batch_size / 256`` and no weight decay, which adapts parameters with more than one
    dimension (``util/lars.py``), so not the bias; 10 epochs of warmup, cosine decay to 0. 90 epochs for
    ViT-Base, 50 for Large and Huge (``FINETUNE.md``). The source freezes the model, and trains a linear layer
    after a batch norm without scale and bias.

    Args:
        batch_size: Effective batch size, in images.
        steps_per_epoch: Optimizer steps per epoch; the default is ImageNet's at batch 16384.
    """
    optimizer = self_supervised_lars(linear_rule(0.1, batch_size), 0.0)
    return recipe(optimizer, steps_of(10, steps_per_epoch), decay="cosine")


class _MAE(NamedTuple):
    base_lr: float
    layer_decay: float


MAE_FINETUNING = {"base": _MAE(5e-4, 0.65), "large": _MAE(1e-3, 0.75), "huge": _MAE(1e-3, 0.75)}
"""Learning rate at batch 256, and layer-wise decay, of MAE's fine-tuning by the size of the model."""


def mae_finetuning(model: str, batch_size: int = 1024, steps_per_epoch: int = 1251) -> Recipe:
    """Fine-tuning of MAE (He et al. 2022, https://github.com/facebookresearch/mae, ``FINETUNE.md``).

    AdamW with ``lr = base_lr * batch_size / 256``, layer-wise decay (``util/lr_decay.py``) and weight decay
    0.05; 5 epochs of warmup, cosine decay to 1e-6. 100 epochs for ViT-Base, 50 for Large and Huge.

    Args:
        model: ``"base"``, ``"large"`` or ``"huge"``.
        batch_size: Effective batch size, in images.
        steps_per_epoch: Optimizer steps per epoch; the default is ImageNet's at batch 1024.

    Raises:
        ValueError: If the source has no command for the model.
    """
    row = row_of("model", model, MAE_FINETUNING)
    lr = linear_rule(row.base_lr, batch_size)
    return recipe(
        partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.999), weight_decay=0.05),
        steps_of(5, steps_per_epoch),
        layer_decay=row.layer_decay,
        decay="cosine",
        end_factor=1e-6 / lr,
    )


MOCO_V3_LINEAR_PROBING = {"resnet50": 0.1, "vit": 3.0}
"""Learning rate at batch 256 of MoCo v3's linear probing."""


def moco_v3_linear_probing(model: str, batch_size: int = 1024) -> Recipe:
    """Linear probing of MoCo v3 (Chen et al. 2021, https://github.com/facebookresearch/moco-v3).

    SGD, not LARS: ``lr = base * batch_size / 256`` with a base of 0.1 for ResNet-50 and 3 for vision
    transformers (``CONFIG.md``), momentum 0.9, no weight decay, no warmup, cosine decay to 0 over 90 epochs
    (``main_lincls.py``, where the rate changes once an epoch). The source freezes all but the last layer, and
    keeps the model in evaluation mode.

    Args:
        model: ``"resnet50"`` or ``"vit"``.
        batch_size: Effective batch size, in images.

    Raises:
        ValueError: If the source has no command for the model.
    """
    base = row_of("model", model, MOCO_V3_LINEAR_PROBING)
    optimizer = partial(torch.optim.SGD, lr=linear_rule(base, batch_size), momentum=0.9, weight_decay=0.0)
    return recipe(optimizer, 0, decay="cosine")
