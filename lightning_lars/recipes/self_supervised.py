"""Published recipes of self-supervised methods."""

from functools import partial
from typing import Any

from lightning_lars.optim import LARS
from lightning_lars.recipes.recipe import Recipe, linear_rule, recipe, row_of, steps_of


def simclr(batch_size: int = 4096, steps_per_epoch: int = 312, base_lr: float = 0.3) -> Recipe:
    """SimCLR (Chen et al. 2020, https://github.com/google-research/simclr).

    ``lr = base_lr * batch_size / 256``, weight decay 1e-6, 10 epochs of warmup, cosine decay to 0; the
    momentum includes the learning rate.

    Args:
        batch_size: Effective batch size, in images.
        steps_per_epoch: Optimizer steps per epoch; the default is ImageNet's at batch 4096.
        base_lr: Learning rate at batch 256: 0.3 for ImageNet, 1.0 for CIFAR-10.

    Example:
        >>> from lightning_lars.recipes import simclr
        >>> simclr(batch_size=1024)["optimizer"].keywords["lr"]
        1.2
    """
    optimizer = self_supervised_lars(linear_rule(base_lr, batch_size), 1e-6, lr_in_momentum=True)
    return recipe(optimizer, steps_of(10, steps_per_epoch), decay="cosine")


def byol(batch_size: int = 4096, steps_per_epoch: int = 312, epochs: int = 1000) -> Recipe:
    """BYOL (Grill et al. 2020, https://github.com/google-deepmind/deepmind-research/tree/master/byol).

    ``lr = base * batch_size / 256`` with a base of 0.45 for 40 and 100 epochs, 0.3 for 300 and 0.2 for 1000;
    weight decay 1e-6, or 1.5e-6 for 1000 epochs; 10 epochs of warmup, cosine decay to 0.

    Args:
        batch_size: Effective batch size, in images.
        steps_per_epoch: Optimizer steps per epoch; the default is ImageNet's at batch 4096.
        epochs: Length of the run, which determines the rate: 40, 100, 300 or 1000.

    Raises:
        ValueError: If the source has no rate for this number of epochs.
    """
    presets = {40: (0.45, 1e-6), 100: (0.45, 1e-6), 300: (0.3, 1e-6), 1000: (0.2, 1.5e-6)}
    base, weight_decay = row_of("epochs", epochs, presets)
    return recipe(
        self_supervised_lars(linear_rule(base, batch_size), weight_decay),
        steps_of(10, steps_per_epoch),
        decay="cosine",
    )


def barlow_twins(batch_size: int = 2048, steps_per_epoch: int = 626) -> Recipe:
    """Barlow Twins (Zbontar et al. 2021, https://github.com/facebookresearch/barlowtwins, ``main.py``).

    ``lr = 0.2 * batch_size / 256``, for biases and norms ``0.0048 * batch_size / 256``; weight decay 1e-6,
    10 epochs of warmup, cosine decay to a thousandth of the peak.

    Args:
        batch_size: Effective batch size, in images.
        steps_per_epoch: Optimizer steps per epoch; the default is ImageNet's at batch 2048.
    """
    optimizer = self_supervised_lars(linear_rule(0.2, batch_size), 1e-6)
    warmup_steps = steps_of(10, steps_per_epoch)
    return recipe(optimizer, warmup_steps, decay="cosine", end_factor=1e-3, excluded_lr_scale=0.024)


def swav(steps_per_epoch: int = 312) -> Recipe:
    """SwAV at batch 4096 (Caron et al. 2020, https://github.com/facebookresearch/swav).

    apex ``LARC`` without clipping around SGD, which excludes nothing: ``lr`` from 0.3 to 4.8 in 10 epochs of
    warmup, cosine decay to 0.0048, weight decay 1e-6 (``main_swav.py``, ``scripts/swav_800ep_pretrain.sh``).
    The source freezes the prototypes for 313 steps, and normalizes them before each step.

    Args:
        steps_per_epoch: Optimizer steps per epoch; the default is ImageNet's at batch 4096.
    """
    peak = 4.8
    return recipe(
        partial(LARS, lr=peak, momentum=0.9, weight_decay=1e-6, trust_coefficient=1e-3),
        steps_of(10, steps_per_epoch),
        decay="cosine",
        start_factor=0.3 / peak,
        end_factor=0.0048 / peak,
        excludes=False,
    )


def moco_v3(batch_size: int = 4096, steps_per_epoch: int = 312, epochs: int = 300) -> Recipe:
    """MoCo v3 of ResNet-50 (Chen et al. 2021, https://github.com/facebookresearch/moco-v3, ``CONFIG.md``).

    ``lr = base * batch_size / 256`` with a base of 0.6 for 100 epochs, 0.3 for 300 and 1000; weight decay
    1e-6, or 1.5e-6 for 1000 epochs; 10 epochs of warmup, cosine decay to 0. Its vision transformers use
    AdamW.

    Args:
        batch_size: Effective batch size, in images.
        steps_per_epoch: Optimizer steps per epoch; the default is ImageNet's at batch 4096.
        epochs: Length of the run, which determines the rate: 100, 300 or 1000.

    Raises:
        ValueError: If the source has no rate for this number of epochs.
    """
    base, weight_decay = row_of("epochs", epochs, {100: (0.6, 1e-6), 300: (0.3, 1e-6), 1000: (0.3, 1.5e-6)})
    return recipe(
        self_supervised_lars(linear_rule(base, batch_size), weight_decay),
        steps_of(10, steps_per_epoch),
        decay="cosine",
    )


def vicreg(batch_size: int = 2048, steps_per_epoch: int = 626, epochs: int = 1000) -> Recipe:
    """VICReg of ResNet-50 (Bardes et al. 2022, https://github.com/facebookresearch/vicreg, ``README.md``).

    ``lr = base * batch_size / 256`` with a base of 0.3 for 100 epochs at batch 512, 0.2 for 1000 at batch
    2048; weight decay 1e-6; 10 epochs of warmup, cosine decay to a thousandth of the peak. Vectors, which are
    the norms and biases, are neither adapted nor decayed (``main_vicreg.py``).

    Args:
        batch_size: Effective batch size, in images.
        steps_per_epoch: Optimizer steps per epoch; the default is ImageNet's at batch 2048.
        epochs: Length of the run, which determines the rate: 100 or 1000.

    Raises:
        ValueError: If the source has no rate for this number of epochs.
    """
    base = row_of("epochs", epochs, {100: 0.3, 1000: 0.2})
    optimizer = self_supervised_lars(linear_rule(base, batch_size), 1e-6)
    return recipe(optimizer, steps_of(10, steps_per_epoch), decay="cosine", end_factor=1e-3)


def self_supervised_lars(lr: float, weight_decay: float, **options: Any) -> partial[Any]:
    """Return LARS with the options that these methods share."""
    return partial(
        LARS,
        lr=lr,
        momentum=0.9,
        weight_decay=weight_decay,
        trust_coefficient=1e-3,
        eps=0.0,
        denominator="decayed_gradient",
        **options,
    )
