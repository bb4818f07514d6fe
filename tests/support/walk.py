"""A module whose weights reveal the learning rates, because the gradient of every step is 1."""

from itertools import pairwise

import lightning.pytorch
import pytorch_lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

BATCHES, BATCH_SIZE = 12, 2
RATES = (0.01, 0.003)


class Walking:
    """Two double precision weights in a group each, trained on 12 batches of 2."""

    def __init__(self, optimizer=torch.optim.SGD, scheduler=None, interval="step"):
        super().__init__()
        self.a = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.b = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.interval = interval
        self.batch_size = BATCH_SIZE
        self.path = []
        self.seen = []

    def training_step(self, batch, batch_idx):
        # Only where it is monitored: it takes as long as all the rest of a step.
        if any(config.reduce_on_plateau for config in self.trainer.lr_scheduler_configs):
            self.log("steady", 1.0)
        return self.a + self.b

    def configure_optimizers(self):
        groups = [{"params": [w], "lr": rate} for w, rate in zip(self.weights(), RATES, strict=True)]
        optimizer = self.optimizer(groups)
        if self.scheduler is None:
            return optimizer
        config = {"scheduler": self.scheduler(optimizer), "interval": self.interval, "monitor": "steady"}
        return [optimizer], [config]

    def train_dataloader(self):
        return DataLoader(torch.zeros(BATCHES * BATCH_SIZE, 1), batch_size=self.batch_size)

    def on_train_start(self):
        self.path = [self.position()]
        self.look()

    def on_train_epoch_start(self):
        self.look()

    def on_train_batch_start(self, batch, batch_idx):
        self.look()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.path.append(self.position())
        self.look()

    def on_train_end(self):
        self.look()

    def weights(self):
        return self.a, self.b

    def position(self):
        return tuple(weight.item() for weight in self.weights())

    def look(self):
        """Note the learning rates that stand in the optimizers between steps."""
        for optimizer in self.trainer.optimizers:
            self.seen += [float(group["lr"]) for group in optimizer.param_groups]

    def moves(self):
        """How far each batch moved the two weights."""
        return [(a - next_a, b - next_b) for (a, b), (next_a, next_b) in pairwise(self.path)]

    def rates(self, adapted=False):
        """The learning rates of the steps that moved the weights, by the length of the weights if adapted."""
        moves = zip(self.moves(), self.path, strict=False)
        return [
            tuple(move / length if adapted else move for move, length in zip(*step, strict=True))
            for step in moves
            if any(step[0])
        ]


class Walk(Walking, lightning.pytorch.LightningModule):
    """The module of lightning.pytorch."""


class OtherWalk(Walking, pytorch_lightning.LightningModule):
    """The module of pytorch_lightning."""


def walker(tmp_path, *callbacks, root=lightning.pytorch, **options):
    """A quiet Trainer of two epochs, from either package."""
    checkpoints = lightning.pytorch.callbacks.Checkpoint, pytorch_lightning.callbacks.Checkpoint
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": tmp_path,
        "enable_checkpointing": any(isinstance(callback, checkpoints) for callback in callbacks),
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "max_epochs": 2,
    }
    return root.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def walk(tmp_path, module, *callbacks, ckpt_path=None, **options):
    """Fit a module and return it."""
    walker(tmp_path, *callbacks, **options).fit(module, ckpt_path=ckpt_path)
    return module


def scaled(rates, factors):
    """The rates of the steps, each times the factor of its step."""
    return [tuple(rate * factor for rate in step) for step, factor in zip(rates, factors, strict=True)]
