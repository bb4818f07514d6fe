"""Published hyperparameters as arguments: optimizer, schedule and excluded parameters.

Every function returns keyword arguments of :class:`~lightning_lars.mixin.LargeBatchMixin`. Where the length
of a run is not part of the recipe, it comes from the Trainer. The schedules count steps from 1, the sources
from 0: here a warmup is one step ahead and spends no step at a rate of 0.

:func:`lars` and :func:`lamb` are for tasks without published numbers. Their source is
``docs/large_batch_study.md``.
"""

from lightning_lars.recipes.mlperf import (
    IMAGENET,
    MLPERF_BERT,
    MLPERF_RESNET50,
    mlperf_bert,
    mlperf_resnet50,
)
from lightning_lars.recipes.recipe import Recipe
from lightning_lars.recipes.self_supervised import barlow_twins, byol, moco_v3, simclr, swav
from lightning_lars.recipes.starting_points import lamb, lars

__all__ = [
    "IMAGENET",
    "MLPERF_BERT",
    "MLPERF_RESNET50",
    "Recipe",
    "barlow_twins",
    "byol",
    "lamb",
    "lars",
    "mlperf_bert",
    "mlperf_resnet50",
    "moco_v3",
    "simclr",
    "swav",
]
