"""The smallest LightningModule with a norm and a bias, and synthetic data."""

from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_lars import LARS, LargeBatchMixin


class Plain(LightningModule):
    """Regression from 4 numbers to 2, in 8 batches of 4, which says nothing of its optimizer."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        return self.net(batch).pow(2).mean()

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        return DataLoader(torch.randn(32, 4, generator=generator), batch_size=4)


class LogsLoss:
    """For a module that logs its loss too, which takes as long as all the rest of a small step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class Boring(LargeBatchMixin, Plain):
    """With the optimizer of the mixin."""

    def __init__(self, width: int = 3, **kwargs):
        super().__init__(width=width, **kwargs)
        self.save_hyperparameters()


class WithoutOptimizer(Boring):
    """A module that Lightning gives a stand-in for an optimizer."""

    def configure_optimizers(self):
        return None


LARS_WITH_DECAY = partial(LARS, lr=1.0, weight_decay=0.1)


def boring(optimizer=LARS_WITH_DECAY, **kwargs):
    """A Boring module with the same weights at every call."""
    torch.manual_seed(0)
    return Boring(optimizer=optimizer, **kwargs)


def trainer(tmp_path, **options):
    """A quiet Trainer that leaves nothing outside of tmp_path."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": tmp_path,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "max_epochs": 1,
    }
    return Trainer(**{**defaults, **options})
