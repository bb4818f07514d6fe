"""Runs of Ray Train: ``python -m tests.workers.ray_runs NAME FOLDER``, with examples/ on the path."""

import sys

import lightning
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_lars import LARS, ExcludeNormAndBias


class Net(lightning.LightningModule):
    """A module that knows nothing of Ray, with callbacks rather than the mixin, in double precision."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 2)).double()

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return LARS(self.parameters(), lr=4.0, weight_decay=5e-4)

    def configure_callbacks(self):
        return [ExcludeNormAndBias(excluded_lr=0.05)]


def made():
    """Module and data, the same in every process."""
    lightning.seed_everything(0)
    return Net(), TensorDataset(torch.randn(1024, 8, dtype=torch.float64))


def train(options):
    """Train on one worker."""
    import ray_train

    ray_train.fit(*made(), options)


def main(name, folder):
    """Train the example without and with a worker that is killed, or the module above with one."""
    import ray
    import ray_train

    function, options = {
        "whole": (ray_train.train, {"kill_in_epoch": None, "accumulate": 1}),
        "killed": (ray_train.train, {"kill_in_epoch": 1, "accumulate": 1}),
        "callbacks": (train, {"kill_in_epoch": 1, "accumulate": 2}),
    }[name]
    # Processes share the cores that the machine has: two workers, and Ray Train itself.
    ray.init(num_cpus=3, include_dashboard=False)
    ray_train.run(function, {**options, "epochs": 2, "folder": folder}, workers=2)
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
