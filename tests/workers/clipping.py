"""Trains with clipped gradients on two processes, strategy by strategy, and leaves what each of them saw.

Run as ``python -m tests.workers.clipping FOLDER``: Lightning starts the second process by the same command.
"""

import sys
from functools import partial
from pathlib import Path

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
        "rank": fitting.global_rank,
    }


def main(folder):
    seen = {}
    for name, (module_class, strategy) in RUNS.items():
        for per_layer in (False, True):
            seen[name, per_layer] = train(folder, module_class, per_layer, strategy=strategy(), devices=2)
    torch.save(seen, folder / f"{seen['ddp', False]['rank']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
