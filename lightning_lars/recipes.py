"""Published hyperparameters as arguments: optimizer, schedule and excluded parameters.

Every function returns keyword arguments of :class:`~lightning_lars.mixin.LargeBatchMixin`. Where the length
of a run is not part of the recipe, it comes from the Trainer. The schedules count steps from 1, the sources
from
0: here a warmup is one step ahead and spends no step at a rate of 0.

:func:`lars` and :func:`lamb` are for tasks without published numbers. Their source is
``docs/large_batch_study.md``.
"""

import math
from functools import partial
from typing import Any, NamedTuple, TypedDict, TypeVar

from lightning_lars.learning_rate.batch_scaling import check_batch_size, scaling_factor
from lightning_lars.learning_rate.warmup_decay import WarmupDecayLR
from lightning_lars.optim import LAMB, LARS
from lightning_lars.rules import require

IMAGENET = 1_281_167  # training images


class Recipe(TypedDict):
    """Keyword arguments of :class:`~lightning_lars.mixin.LargeBatchMixin`."""

    optimizer: partial[Any]
    lr_scheduler: partial[WarmupDecayLR]
    exclude_norm: bool
    exclude_bias: bool
    exclude_gain: bool
    excluded_lr: float | None
    excluded_lr_scale: float


def lars(batch_size: int, warmup_steps: int = 20) -> Recipe:
    """Starting point for LARS, scaled with the batch size.

    ::

        lr           = 6    * sqrt(batch_size / 128)        for norms and biases: 0.05 at any batch size
        weight_decay = 5e-4 * sqrt(batch_size / 128)        so that lr * weight_decay * steps stays the same
        trust_clip   = 0.02

    Momentum 0.9, linear warmup, linear decay to 0. The evidence is Fashion-MNIST at batch 128 and 2,048
    (``docs/large_batch_study.md``): a CNN with batch norm, an MLP without norms and a transformer all train
    near their best at the rate for batch 2,048. The CNN is best at 2 to 3 times that rate; the MLP degrades
    between 1.3 and 2.7 times. ``trust_clip`` keeps networks with norms training where the rate is far too
    high, and costs up to a point where the rate is right. Search around ``lr`` in factors of 2.

    Args:
        batch_size: Effective batch size, at least 1.
        warmup_steps: Optimizer steps of warmup, for example a tenth of the run; fewer than its steps.

    Raises:
        ValueError: If ``batch_size`` is below 1.

    Example:
        >>> from lightning_lars.recipes import lars
        >>> lars(batch_size=2048)["optimizer"].keywords["lr"]
        24.0
    """
    factor = _square_root_of_128(batch_size)
    optimizer = partial(LARS, lr=6 * factor, momentum=0.9, weight_decay=5e-4 * factor, trust_clip=0.02)
    return _recipe(optimizer, warmup_steps, excluded_lr=0.05, decay="polynomial", power=1.0)


def lamb(batch_size: int, warmup_steps: int = 20) -> Recipe:
    """Starting point for LAMB, scaled with the batch size.

    ::

        lr           = 0.0075 * sqrt(batch_size / 128)      for norms and biases: 0.01 at any batch size
        weight_decay = 0.01   * sqrt(batch_size / 128)      so that lr * weight_decay * steps stays the same

    Gradients are clipped to a norm of 1; linear warmup, linear decay to 0. From the same evidence as
    :func:`lars`, with more to gain than with LARS for networks without norms or with layer norms: all three
    networks train near their best at the rate for batch 2,048. The CNN is best at 1.3 to 2.7 times that rate,
    where the MLP and the transformer degrade.

    Args:
        batch_size: Effective batch size, at least 1.
        warmup_steps: Optimizer steps of warmup, for example a tenth of the run; fewer than its steps.

    Raises:
        ValueError: If ``batch_size`` is below 1.
    """
    factor = _square_root_of_128(batch_size)
    optimizer = partial(LAMB, lr=0.0075 * factor, weight_decay=0.01 * factor, max_grad_norm=1.0)
    return _recipe(optimizer, warmup_steps, excluded_lr=0.01, decay="polynomial", power=1.0)


def _square_root_of_128(batch_size: int) -> float:
    check_batch_size("batch_size", batch_size)
    return scaling_factor(batch_size, 128, "sqrt")


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
    optimizer = _lars(base_lr * batch_size / 256, 1e-6, lr_in_momentum=True)
    return _recipe(optimizer, 10 * steps_per_epoch, decay="cosine")


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
    base, weight_decay = _row("epochs", epochs, presets)
    return _recipe(_lars(base * batch_size / 256, weight_decay), 10 * steps_per_epoch, decay="cosine")


def barlow_twins(batch_size: int = 2048, steps_per_epoch: int = 626) -> Recipe:
    """Barlow Twins (Zbontar et al. 2021, https://github.com/facebookresearch/barlowtwins, ``main.py``).

    ``lr = 0.2 * batch_size / 256``, for biases and norms ``0.0048 * batch_size / 256``; weight decay 1e-6,
    10 epochs of warmup, cosine decay to a thousandth of the peak.

    Args:
        batch_size: Effective batch size, in images.
        steps_per_epoch: Optimizer steps per epoch; the default is ImageNet's at batch 2048.
    """
    optimizer = _lars(0.2 * batch_size / 256, 1e-6)
    warmup_steps = 10 * steps_per_epoch
    return _recipe(optimizer, warmup_steps, decay="cosine", end_factor=1e-3, excluded_lr_scale=0.024)


def swav(steps_per_epoch: int = 312) -> Recipe:
    """SwAV at batch 4096 (Caron et al. 2020, https://github.com/facebookresearch/swav).

    apex ``LARC`` without clipping around SGD, which excludes nothing: ``lr`` from 0.3 to 4.8 in 10 epochs of
    warmup, cosine decay to 0.0048, weight decay 1e-6 (``main_swav.py``, ``scripts/swav_800ep_pretrain.sh``).
    The source freezes the prototypes for 313 steps, and normalizes them before each step.

    Args:
        steps_per_epoch: Optimizer steps per epoch; the default is ImageNet's at batch 4096.
    """
    peak = 4.8
    return _recipe(
        partial(LARS, lr=peak, momentum=0.9, weight_decay=1e-6, trust_coefficient=1e-3),
        10 * steps_per_epoch,
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
    base, weight_decay = _row("epochs", epochs, {100: (0.6, 1e-6), 300: (0.3, 1e-6), 1000: (0.3, 1.5e-6)})
    return _recipe(_lars(base * batch_size / 256, weight_decay), 10 * steps_per_epoch, decay="cosine")


class _ResNet50(NamedTuple):
    lr: float
    warmup_epochs: int
    momentum: float
    weight_decay: float


MLPERF_RESNET50 = {
    1632: _ResNet50(7.4, 2, 0.9, 5e-5),
    3264: _ResNet50(10.5, 2, 0.9, 5e-5),
    4096: _ResNet50(10.0, 5, 0.9, 2e-4),
    8192: _ResNet50(17.0, 5, 0.9, 2e-4),
    13056: _ResNet50(12.8, 9, 0.9, 2.5e-5),
    32768: _ResNet50(21.2, 16, 0.94, 2.5e-5),
    49152: _ResNet50(19.405, 24, 0.951807, 1e-4),
    58880: _ResNet50(23.246, 29, 0.951807, 1e-4),
    65536: _ResNet50(24.699, 31, 0.951807, 1e-4),
    67840: _ResNet50(24.699, 31, 0.951807, 1e-4),
}
"""Learning rate, warmup epochs, momentum and weight decay of MLPerf's ResNet-50, by batch size."""


def mlperf_resnet50(batch_size: int, steps_per_epoch: int | None = None) -> Recipe:
    """ResNet-50 on ImageNet with LARS, from MLPerf's reference convergence points (``rcps_resnet.json``).

    From https://github.com/mlcommons/logging; polynomial decay of power 2 to a rate of 1e-4; the momentum
    includes the learning rate. Expects label smoothing of 0.1.

    Args:
        batch_size: Effective batch size, in images: a key of :data:`MLPERF_RESNET50`.
        steps_per_epoch: Optimizer steps per epoch; None for ImageNet's.

    Raises:
        ValueError: If the source has no row for the batch size.
    """
    row = _row("batch_size", batch_size, MLPERF_RESNET50)
    if steps_per_epoch is None:
        steps_per_epoch = math.ceil(IMAGENET / batch_size)
    optimizer = partial(
        LARS, lr=row.lr, momentum=row.momentum, weight_decay=row.weight_decay, eps=0.0, lr_in_momentum=True
    )
    return _recipe(
        optimizer,
        row.warmup_epochs * steps_per_epoch,
        decay="polynomial",
        end_factor=1e-4 / row.lr,
    )


class _BERT(NamedTuple):
    lr: float
    steps: int
    betas: tuple[float, float]
    weight_decay: float


MLPERF_BERT = {
    256: _BERT(3.5e-4, 13700, (0.9, 0.999), 0.01),
    448: _BERT(4.25e-4, 6700, (0.9, 0.999), 0.01),
    1536: _BERT(2e-3, 2254, (0.66, 0.996), 0.01),
    4096: _BERT(2.4e-3, 855, (0.66, 0.998), 0.01),
    4608: _BERT(3.5e-3, 700, (0.62, 0.9), 0.01),
    6144: _BERT(2.9293e-3, 700, (0.7206, 0.78921), 1e-3),
    6912: _BERT(2.9293e-3, 700, (0.7206, 0.78921), 1e-3),
}
"""Learning rate, steps, betas and weight decay of MLPerf's BERT-large, by batch size."""


def mlperf_bert(batch_size: int) -> Recipe:
    """BERT-large with LAMB, second phase, from MLPerf's reference convergence points (``rcps_bert.json``).

    From https://github.com/mlcommons/logging; no warmup, because training starts from a checkpoint; linear
    decay to 0 over the steps of the row; gradients clipped to a norm of 1. The rows with a warmup (3072, and
    from 8192 on), at whose end the rate drops abruptly, are omitted.

    Args:
        batch_size: Effective batch size, in sequences: a key of :data:`MLPERF_BERT`.

    Raises:
        ValueError: If the source has no such row for the batch size.
    """
    row = _row("batch_size", batch_size, MLPERF_BERT)
    optimizer = partial(
        LAMB, lr=row.lr, betas=row.betas, eps=1e-6, weight_decay=row.weight_decay, max_grad_norm=1.0
    )
    return _recipe(optimizer, 0, decay="polynomial", power=1.0, total_steps=row.steps)


def _lars(lr: float, weight_decay: float, **options: Any) -> partial[Any]:
    """Return LARS in the variant of the self-supervised methods."""
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


def _recipe(
    optimizer: partial[Any],
    warmup_steps: int,
    *,
    excludes: bool = True,
    excluded_lr: float | None = None,
    excluded_lr_scale: float = 1.0,
    **schedule: Any,
) -> Recipe:
    return Recipe(
        optimizer=optimizer,
        lr_scheduler=partial(WarmupDecayLR, warmup_steps=warmup_steps, **schedule),
        exclude_norm=excludes,
        exclude_bias=excludes,
        exclude_gain=excludes,
        excluded_lr=excluded_lr,
        excluded_lr_scale=excluded_lr_scale,
    )


_Row = TypeVar("_Row")


def _row(argument: str, value: int, rows: dict[int, _Row]) -> _Row:
    require(argument, f"one of {tuple(rows)}, for which the source has numbers", value, value in rows)
    return rows[value]
