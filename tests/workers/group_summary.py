"""Prints the groups of parameters that two ranks share."""

import io
from contextlib import redirect_stdout

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lightning_lars import LARS, param_groups
from lightning_lars.callbacks.param_group_summary import ParamGroupSummary
from tests.support.boring import Boring, trainer
from tests.workers.lightning_strategies import CPUFSDPStrategy


class Gated(nn.Sequential):
    """Has a gain that is part of no wrapped layer: FSDP1 leaves the shape to the wrapper around the whole."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.gate = nn.Parameter(torch.ones(5))

    def forward(self, batch):
        return super().forward(batch) * self.gate


class Wide(LightningModule):
    """Odd numbers, and a parameter that nobody trains."""

    def __init__(self):
        super().__init__()
        self.net = Gated(nn.Linear(4, 7), nn.LayerNorm(7), nn.Linear(7, 5))
        self.lost = nn.Parameter(torch.zeros(3))

    def training_step(self, batch, batch_idx):
        return self.net(batch).sum() + self.lost.sum()

    def configure_optimizers(self):
        groups = param_groups(self)
        for group in groups:
            group["params"] = [(name, p) for name, p in group["params"] if name != "lost"]
        return LARS(groups)

    train_dataloader = Boring.train_dataloader


class Sharded(Wide):
    def configure_model(self):
        if not any(hasattr(p, "device_mesh") for p in self.parameters()):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


RUNS = {
    "ddp": (Wide, DDPStrategy),
    "fsdp1": (Wide, lambda: CPUFSDPStrategy(auto_wrap_policy=ModuleWrapPolicy({nn.Linear}))),
    "fsdp2": (Sharded, lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)),
}


def printed(folder):
    """What this rank prints under one strategy after the other."""
    with redirect_stdout(io.StringIO()) as output:
        for module, strategy in RUNS.values():
            options = {"devices": 2, "strategy": strategy(), "max_steps": 1, "use_distributed_sampler": False}
            trainer(folder, callbacks=[ParamGroupSummary()], **options).fit(module())
    return output.getvalue()
