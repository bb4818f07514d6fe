"""Trains with clipped gradients, on one rank or under a strategy of several."""

from functools import partial

import torch

from lightning_lars.callbacks.percentile_gradient_clipping import PercentileGradientClipping
from tests.support.boring import trainer
from tests.support.small_network import STEPS
from tests.workers.lightning_strategies import FSDP2, TensorParallel, Used, Witness, ddp, fsdp, model_parallel

SGD = partial(torch.optim.SGD, lr=0.1, foreach=False)
RUNS = {
    "ddp": (Used, ddp),
    "fsdp": (Used, fsdp),
    "fsdp2": (FSDP2, partial(model_parallel, 2, 1)),
    "tensor parallel": (TensorParallel, partial(model_parallel, 1, 2)),
}


def train(folder, module_class=Used, per_layer=False, **options):
    """Take five steps; return parameters after each of them, and the norms that were kept."""
    clipping, witness = PercentileGradientClipping(50.0, history=4, per_layer=per_layer), Witness()
    fitting = trainer(
        folder, callbacks=[clipping, witness], max_steps=STEPS, use_distributed_sampler=False, **options
    )
    fitting.fit(module_class(optimizer=SGD))
    return {
        "values": witness.values,
        "norms": clipping.state_dict()["norms"][0],
        "logged": {key: value.item() for key, value in fitting.callback_metrics.items()},
    }


def train_under(strategy, folder):
    """Train on two ranks, without and with a threshold for each layer."""
    module_class, make = RUNS[strategy]
    return [train(folder, module_class, each, strategy=make(), devices=2) for each in (False, True)]
