"""A module whose parameters FSDP2 replaces, and a CLI that trains it.

Run as ``python -m tests.workers.late_optimizer fit ...``, it prints on each rank how many weights have moved.
"""

import lightning.pytorch.cli
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_lars.cli import LargeBatchCLI
from tests.support.boring import Boring

CLIS = {"LargeBatchCLI": LargeBatchCLI, "LightningCLI": lightning.pytorch.cli.LightningCLI}


class Replaced(LightningModule):
    """Shards its network in configure_model, which puts new parameters in place of the old."""

    def __init__(self, width: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 2))
        self.is_sharded = False

    training_step = Boring.training_step
    train_dataloader = Boring.train_dataloader

    def configure_model(self):
        if not self.is_sharded:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
            self.is_sharded = True

    def on_fit_start(self):
        self.before = [parameter.full_tensor().clone() for parameter in self.parameters()]

    def on_fit_end(self):
        after = [parameter.full_tensor() for parameter in self.parameters()]
        self.moved = [not torch.equal(left, right) for left, right in zip(self.before, after, strict=True)]


def fit(name, arguments):
    """Train by a CLI; return which weights have moved."""
    return CLIS[name](Replaced, args=arguments, save_config_callback=None).model.moved


if __name__ == "__main__":
    moved = LargeBatchCLI(Replaced, save_config_callback=None).model.moved
    print(f"{sum(moved)} of {len(moved)} moved", flush=True)
