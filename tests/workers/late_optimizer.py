"""A module whose parameters FSDP2 replaces, driven by the CLI of choice.

Run as ``python -m tests.workers.late_optimizer LargeBatchCLI fit ...``: Lightning starts the second process
by the same command. Prints, for every process, how many of its weights have moved.
"""

import sys

import lightning.pytorch.cli
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_lars.cli import LargeBatchCLI
from tests.support.boring import Boring


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
        moved = sum(not torch.equal(left, right) for left, right in zip(self.before, after, strict=True))
        print(f"{moved} of {len(after)} moved", flush=True)


if __name__ == "__main__":
    name = sys.argv.pop(1)
    cli = LargeBatchCLI if name == "LargeBatchCLI" else lightning.pytorch.cli.LightningCLI
    # The second process is started with what the first one has in sys.argv.
    arguments, sys.argv[1:] = sys.argv[1:], [name, *sys.argv[1:]]
    cli(Replaced, args=arguments)
