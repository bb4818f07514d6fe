"""A module whose gradient is the mean of its batch, and the gradients that a batch-size schedule says."""

from itertools import accumulate

import lightning.pytorch
import pytorch_lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_lars import effective_batch_size

BATCHES, SIZE = 11, 2
"""Of an epoch. A prime number, so that no batch size divides an epoch."""
RATE = 0.1


def numbers():
    """The data: the gradient of a batch is the mean of its numbers."""
    return torch.randn(BATCHES * SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Stream(IterableDataset):
    """The data without a length."""

    def __iter__(self):
        return iter(numbers())


class Averaging:
    """One weight. Notes the gradient after every batch, and those that are stepped with."""

    def __init__(self, data=None, scheduler=None):
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.data = numbers() if data is None else data
        self.scheduler = scheduler
        self.accumulated, self.stepped, self.rates, self.sizes = [], [], [], []

    def training_step(self, batch, batch_idx):
        return self.w * batch.mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=RATE)
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=SIZE)

    def on_train_batch_start(self, batch, batch_idx):
        self.sizes.append(effective_batch_size(self.trainer, SIZE))

    def on_before_optimizer_step(self, optimizer):
        self.stepped.append(self.w.grad.item())
        before = self.w.item()
        step = optimizer.register_step_post_hook(
            lambda *_: (self.rates.append((before - self.w.item()) / self.stepped[-1]), step.remove())
        )

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.accumulated.append((self.w.grad.item(), self.trainer.global_step))


class Mean(Averaging, lightning.pytorch.LightningModule):
    """The module of lightning.pytorch."""


class OtherMean(Averaging, pytorch_lightning.LightningModule):
    """The module of pytorch_lightning."""


class Reference:
    """What a schedule says, batch by batch, in an epoch after the other."""

    def __init__(self, batch_sizes, unit, epochs=2, batches=BATCHES):
        self.micro = numbers().unflatten(0, (-1, SIZE)).mean(1).tolist()[:batches]
        self.accumulated, self.stepped, self.sizes, self.size_of_batches = [], [], [], []
        samples = 0
        for _ in range(epochs):
            waiting = list(self.micro)
            while waiting:
                position = len(self.stepped) if unit == "steps" else samples
                scheduled = batch_sizes[max(begin for begin in batch_sizes if begin <= position)]
                taken, waiting = waiting[: scheduled // SIZE], waiting[scheduled // SIZE :]
                steps = [len(self.stepped)] * (len(taken) - 1) + [len(self.stepped) + 1]
                sums = accumulate(each / len(taken) for each in taken)
                self.accumulated += zip(sums, steps, strict=True)
                self.stepped.append(sum(taken) / len(taken))
                self.sizes.append(len(taken) * SIZE)
                self.size_of_batches += [len(taken) * SIZE] * len(taken)
                samples += len(taken) * SIZE
        self.steps_after = [steps for _, steps in self.accumulated]
