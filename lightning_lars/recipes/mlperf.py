"""MLPerf's reference convergence points, from https://github.com/mlcommons/logging."""

import math
from functools import partial
from typing import NamedTuple

from lightning_lars.optim import LAMB, LARS
from lightning_lars.recipes.recipe import Recipe, recipe, row_of, steps_of

IMAGENET = 1_281_167  # training images


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

    Polynomial decay of power 2 to a rate of 1e-4; the momentum includes the learning rate. Expects label
    smoothing of 0.1.

    Args:
        batch_size: Effective batch size, in images: a key of ``MLPERF_RESNET50``.
        steps_per_epoch: Optimizer steps per epoch; None for ImageNet's.

    Raises:
        ValueError: If the source has no row for the batch size.
    """
    row = row_of("batch_size", batch_size, MLPERF_RESNET50)
    if steps_per_epoch is None:
        steps_per_epoch = math.ceil(IMAGENET / batch_size)
    optimizer = partial(
        LARS, lr=row.lr, momentum=row.momentum, weight_decay=row.weight_decay, eps=0.0, lr_in_momentum=True
    )
    return recipe(
        optimizer,
        steps_of(row.warmup_epochs, steps_per_epoch),
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

    No warmup, because training starts from a checkpoint; linear decay to 0 over the steps of the row;
    gradients clipped to a norm of 1. The rows with a warmup (3072, and from 8192 on) are omitted: their rate
    drops abruptly at its end.

    Args:
        batch_size: Effective batch size, in sequences: a key of ``MLPERF_BERT``.

    Raises:
        ValueError: If the source has no such row for the batch size.
    """
    row = row_of("batch_size", batch_size, MLPERF_BERT)
    optimizer = partial(
        LAMB, lr=row.lr, betas=row.betas, eps=1e-6, weight_decay=row.weight_decay, max_grad_norm=1.0
    )
    return recipe(optimizer, 0, decay="polynomial", power=1.0, total_steps=row.steps)
