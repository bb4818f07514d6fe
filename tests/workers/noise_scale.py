"""A model with known gradients and the noise scale of its batches, on one rank and on several."""

import warnings
from functools import partial

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.utils.data import DataLoader

from lightning_lars.callbacks.gradient_noise_scale import GradientNoiseScale
from tests.support.boring import trainer
from tests.workers.lightning_strategies import CPUFSDPStrategy

MEAN = np.array([0.5, -0.25, 0.0, 0.25])
DEVIATION = np.array([1.0, 2.0, 0.5, 1.5])
# In closed form: the gradient of a sample is the sample.
TR_SIGMA, SQUARED_GRADIENT = float((DEVIATION**2).sum()), float((MEAN**2).sum())
B_SIMPLE = TR_SIGMA / SQUARED_GRADIENT


def samples(number, seed=0):
    """Of known mean and deviation."""
    return MEAN + DEVIATION * np.random.default_rng(seed).standard_normal((number, 4))


class Linear:
    """The mean of ``w . x``, over two parameters, which do not move."""

    optimizer = staticmethod(partial(torch.optim.SGD, lr=0.0))

    def __init__(self, data=None, batch_size=4):
        super().__init__()
        self.data = torch.as_tensor(samples(64) if data is None else data)
        self.batch_size = batch_size
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.v = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return (batch[:, :3] @ self.w + batch[:, 3:] @ self.v).mean()

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=self.batch_size)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Module(Linear, LightningModule):
    """For Trainers of lightning.pytorch."""


def expected(steps, decay=0.99):
    """What is logged after steps, each a list of the arrays of samples of its micro-batches."""
    estimates = []
    for micro_batches in steps:
        sizes = {len(each) for each in micro_batches}
        assert len(sizes) == 1
        small, big = sizes.pop(), sum(map(len, micro_batches))
        squares = np.mean([np.square(each.mean(0)).sum() for each in micro_batches])
        square = np.square(np.concatenate(micro_batches).mean(0)).sum()
        estimates.append(
            (
                (squares - square) / (1 / small - 1 / big),
                (big * square - small * squares) / (big - small),
            )
        )
    weights = [decay ** (len(estimates) - 1 - i) for i in range(len(estimates))]
    trace, gradient = np.average(estimates, axis=0, weights=weights)
    return {"tr_sigma": trace, "squared_gradient": gradient}


class Shared(Module):
    """Each process has every second sample."""

    def train_dataloader(self):
        return DataLoader(self.data[self.trainer.global_rank :: 2], batch_size=self.batch_size)


class Uneven(Module):
    """The last batch of one process is short."""

    def train_dataloader(self):
        rank = self.trainer.global_rank
        return DataLoader(self.data[rank::2][: 16 - rank], batch_size=self.batch_size)


class NotReduced(DDPStrategy):
    """Every process keeps its own gradients; Lightning registers such hooks for GPUs only."""

    def configure_ddp(self):
        super().configure_ddp()
        self.model.register_comm_hook(None, noop_hook)


CLOSED_FORM = {"data": samples(16 * 200), "batch_size": 8}
RUNS = {
    "ddp": (Shared, {}, DDPStrategy, {}),
    "ddp, bucket views": (Shared, {}, partial(DDPStrategy, gradient_as_bucket_view=True), {}),
    "ddp, accumulated": (Shared, {}, DDPStrategy, {"accumulate_grad_batches": 2}),
    "ddp, closed form": (Shared, CLOSED_FORM, DDPStrategy, {}),
    "ddp, uneven": (Uneven, {}, DDPStrategy, {}),
    "ddp, not reduced": (Shared, {}, NotReduced, {}),
    "fsdp": (Module, {}, CPUFSDPStrategy, {}),
    "fsdp2": (Module, {}, partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1), {}),
}


def measure(run, folder):
    """Measure on two ranks in a run, and return what came of it."""
    module, arguments, strategy, options = RUNS[run]
    fitting = trainer(
        folder,
        callbacks=[GradientNoiseScale(every_n_steps=1)],
        strategy=strategy(),
        devices=2,
        logger=CSVLogger(folder, name=run),
        log_every_n_steps=1,
        use_distributed_sampler=False,
        **options,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fitting.fit(module(**arguments))
            error = None
        except MisconfigurationException as raised:
            error = str(raised)
    return {
        "metrics": {key: value.item() for key, value in fitting.callback_metrics.items()},
        "error": error,
        "warnings": [str(each.message) for each in caught],
        "state": fitting.callbacks[0].state_dict(),
    }
