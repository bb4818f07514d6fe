"""Published recipes that train on ImageNet's labels with LAMB."""

from functools import partial
from typing import NamedTuple

from lightning_lars.optim import LAMB
from lightning_lars.recipes.recipe import Recipe, recipe, row_of, steps_of


class _ResNetStrikesBack(NamedTuple):
    lr: float
    weight_decay: float


RESNET_STRIKES_BACK = {
    "A1": _ResNetStrikesBack(5e-3, 0.01),
    "A2": _ResNetStrikesBack(5e-3, 0.02),
    "A3": _ResNetStrikesBack(8e-3, 0.02),
}
"""Learning rate and weight decay of the procedures A1 (600 epochs), A2 (300) and A3 (100)."""


def resnet_strikes_back(procedure: str, steps_per_epoch: int = 625) -> Recipe:
    """ResNet-50 on ImageNet at batch 2048, "ResNet strikes back" (Wightman et al. 2021, arXiv:2110.00476).

    From its table of ingredients and hyperparameters: LAMB, 5 epochs of warmup, cosine decay. A1 takes 600
    epochs, A2 300, and A3 100 at resolution 160. All use a binary cross-entropy loss with mixup (0.2, 0.1 and
    0.1) and CutMix (1.0), and A1 label smoothing of 0.1. The rest is from the authors' code
    (https://github.com/huggingface/pytorch-image-models, ``timm/optim/lamb.py``): gradients clipped to a norm
    of 1, and neither norms nor biases adapted or decayed. There, the rate changes once an epoch, the cosine
    includes the warmup, and both ends of the schedule are settings that the paper does not state: here 0.

    Args:
        procedure: ``"A1"``, ``"A2"`` or ``"A3"``.
        steps_per_epoch: Optimizer steps per epoch; the default is ImageNet's at batch 2048.

    Raises:
        ValueError: If the paper has no such procedure.
    """
    row = row_of("procedure", procedure, RESNET_STRIKES_BACK)
    optimizer = partial(LAMB, lr=row.lr, eps=1e-6, weight_decay=row.weight_decay, max_grad_norm=1.0)
    return recipe(optimizer, steps_of(5, steps_per_epoch), decay="cosine")


class _DeiT3(NamedTuple):
    lr: float
    weight_decay: float


DEIT3 = {
    "small": _DeiT3(4e-3, 0.05),
    "base": _DeiT3(3e-3, 0.05),
    "large": _DeiT3(3e-3, 0.05),
    "huge": _DeiT3(3e-3, 0.05),
}
"""Learning rate and weight decay of DeiT III on ImageNet-1k by the size of the model, for 800 epochs."""

DEIT3_IMAGENET21K = {
    "pretraining": _DeiT3(1e-3, 0.02),
    "finetuning": _DeiT3(3e-4, 0.02),
}
"""The same for any size on ImageNet-21k (240 epochs, 90 for huge), and then on ImageNet-1k (50 epochs)."""


def deit3(model: str, steps_per_epoch: int = 625) -> Recipe:
    """Vision transformers on ImageNet-1k at batch 2048, DeiT III (Touvron et al. 2022, arXiv:2204.07118).

    From the commands in https://github.com/facebookresearch/deit, ``README_revenge.md``, and the defaults of
    its ``main.py``: LAMB with an epsilon of 1e-8, gradients clipped to a norm of 1 (apex's ``FusedLAMB``),
    5 epochs of warmup from 1e-6, cosine decay to 1e-5; weight decay and adaptation for neither vectors, class
    tokens nor position embeddings. The runs have 800 epochs, a binary cross-entropy loss and repeated
    augmentation. In the source the rate changes once an epoch, and the cosine includes the warmup.

    Args:
        model: ``"small"``, ``"base"``, ``"large"`` or ``"huge"``.
        steps_per_epoch: Optimizer steps per epoch; the default is ImageNet's at batch 2048.

    Raises:
        ValueError: If the source has no command for the model.
    """
    return _deit3(row_of("model", model, DEIT3), steps_per_epoch)


def deit3_imagenet21k(stage: str, steps_per_epoch: int) -> Recipe:
    """DeiT III pretraining on ImageNet-21k, or fine-tuning on ImageNet-1k after that, at batch 2048.

    As :func:`deit3`, from the same source, for all sizes. Both have label smoothing of 0.1 and CutMix, and
    neither mixup nor repeated augmentation.

    Args:
        stage: ``"pretraining"`` or ``"finetuning"``.
        steps_per_epoch: Optimizer steps per epoch.

    Raises:
        ValueError: If there is no such stage.
    """
    return _deit3(row_of("stage", stage, DEIT3_IMAGENET21K), steps_per_epoch)


def _deit3(row: _DeiT3, steps_per_epoch: int) -> Recipe:
    optimizer = partial(LAMB, lr=row.lr, eps=1e-8, weight_decay=row.weight_decay, max_grad_norm=1.0)
    return recipe(
        optimizer,
        steps_of(5, steps_per_epoch),
        decay="cosine",
        start_factor=1e-6 / row.lr,
        end_factor=1e-5 / row.lr,
    )
