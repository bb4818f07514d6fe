"""Modules whose weights reveal the learning rates under strategies of several ranks, and their runs."""

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_lars import BatchSizeScaling, LearningRateWarmup, effective_batch_size
from tests.support.walk import BATCH_SIZE, BATCHES, Walk, walker

WARMUP, BASE = 5, 3


class Measured(Walk):
    """Asks for the effective batch size."""

    def on_train_start(self):
        super().on_train_start()
        self.size = effective_batch_size(self.trainer)


class Sharded(Measured):
    """Moves a linear layer that is sharded, by the same rates."""

    def configure_model(self):
        self.net = nn.Linear(4, 2, dtype=torch.float64)
        nn.init.ones_(self.net.weight)
        nn.init.ones_(self.net.bias)
        self.shard()

    def shard(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.net(batch).mean(0).sum()

    def weights(self):
        return self.net.weight, self.net.bias

    def position(self):
        return tuple(weight.to_local().flatten()[0].item() for weight in self.weights())

    def train_dataloader(self):
        data = torch.ones(BATCHES * BATCH_SIZE, 4, dtype=torch.float64)
        return DataLoader(data, batch_size=BATCH_SIZE)


class TensorParallel(Sharded):
    """The same layer, its outputs divided between the processes."""

    def shard(self):
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], ColwiseParallel())


RUNS = {
    "ddp": (Measured, DDPStrategy),
    "fsdp2": (Sharded, lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)),
    "tensor parallel": (
        TensorParallel,
        lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
    ),
}


def train(folder):
    """Train under one strategy after the other, and leave the checkpoint of DDP in the folder."""
    seen = {}
    for name, (module, strategy) in RUNS.items():
        module = module()
        callbacks = LearningRateWarmup(WARMUP), BatchSizeScaling(BASE)
        fitting = walker(folder, *callbacks, devices=2, strategy=strategy(), max_epochs=1)
        fitting.fit(module)
        seen[name] = {"rates": module.rates(), "size": module.size, "path": module.path}
        if name == "ddp":
            fitting.save_checkpoint(folder / "ddp.ckpt")
    return seen
