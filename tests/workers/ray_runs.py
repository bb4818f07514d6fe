"""Runs of Ray Train, in one Ray: ``python -m tests.workers.ray_runs FOLDER``, with examples/ on the path."""

import sys
from pathlib import Path

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


def main(folder):
    """Train the example with and without a worker that dies, and the module above with one."""
    import ray
    import ray_train

    # Processes share the cores that the machine has: two workers, and Ray Train itself.
    ray.init(num_cpus=3, include_dashboard=False)
    for name, function, options in [
        ("whole", ray_train.train, {"kill_in_epoch": None, "accumulate": 1}),
        ("killed", ray_train.train, {"kill_in_epoch": 1, "accumulate": 1}),
        ("callbacks", train, {"kill_in_epoch": 1, "accumulate": 2}),
    ]:
        (folder / name).mkdir()
        ray_train.run(function, {**options, "epochs": 2, "folder": str(folder / name)}, workers=2)
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
