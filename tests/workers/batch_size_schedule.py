"""Runs of two ranks with a schedule of the batch size."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_lars import BatchSizeSchedule
from tests.support.mean import RATE, SIZE, Mean, numbers
from tests.support.walk import walker

BATCH_SIZES = {0: 4, 8: 12, 28: 8}
"""By samples: of both ranks, in batches of 2 each."""
LIMIT = 5


class Shared(Mean):
    """Gives the two ranks one batch after the other."""

    def training_step(self, batch, batch_idx):
        return self.w * numbers().unflatten(0, (-1, SIZE))[2 * batch_idx + self.global_rank].mean()


class Sharded(LightningModule):
    """The same gradients for a row of two weights, of which each rank holds one."""

    def __init__(self):
        super().__init__()
        self.path = []

    def configure_model(self):
        self.net = nn.Linear(1, 2, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.net.weight)
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        batch = numbers().unflatten(0, (-1, SIZE))[2 * batch_idx + self.global_rank]
        return self.net(batch[:, None]).sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)

    def train_dataloader(self):
        return DataLoader(numbers(), batch_size=SIZE)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.path.append((self.net.weight.full_tensor().flatten().tolist(), self.trainer.global_step))


def train(folder):
    """Return what the ranks of DDP and of FSDP2 saw; keep the checkpoint of DDP."""
    shared, sharded = Shared(), Sharded()
    strategies = {
        "ddp": shared,
        ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1): sharded,
    }
    for strategy, module in strategies.items():
        trainer = walker(
            folder,
            BatchSizeSchedule(BATCH_SIZES, unit="samples"),
            strategy=strategy,
            devices=2,
            limit_train_batches=LIMIT,
            max_epochs=1,
        )
        trainer.fit(module)
        if module is shared:
            trainer.save_checkpoint(folder / "two ranks.ckpt")
    steps = [step for _, step in shared.accumulated]
    return {"stepped": shared.stepped, "steps": steps, "path": sharded.path}
