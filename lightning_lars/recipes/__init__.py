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
from lightning_lars.recipes.self_supervised import barlow_twins, byol, moco_v3, simclr, swav, vicreg
from lightning_lars.recipes.starting_points import lamb, lars
from lightning_lars.recipes.supervised import (
    DEIT3,
    DEIT3_IMAGENET21K,
    RESNET_STRIKES_BACK,
    deit3,
    deit3_imagenet21k,
    resnet_strikes_back,
)
from lightning_lars.recipes.transfer import (
    MAE_FINETUNING,
    MOCO_V3_LINEAR_PROBING,
    mae_finetuning,
    mae_linear_probing,
    moco_v3_linear_probing,
)

__all__ = [
    "DEIT3",
    "DEIT3_IMAGENET21K",
    "IMAGENET",
    "MAE_FINETUNING",
    "MLPERF_BERT",
    "MLPERF_RESNET50",
    "MOCO_V3_LINEAR_PROBING",
    "RESNET_STRIKES_BACK",
    "Recipe",
    "barlow_twins",
    "byol",
    "deit3",
    "deit3_imagenet21k",
    "lamb",
    "lars",
    "mae_finetuning",
    "mae_linear_probing",
    "mlperf_bert",
    "mlperf_resnet50",
    "moco_v3",
    "moco_v3_linear_probing",
    "resnet_strikes_back",
    "simclr",
    "swav",
    "vicreg",
]
