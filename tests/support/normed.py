"""A module with two batch norms, and the statistics of their inputs, in double precision."""

import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

SAMPLES, BATCH_SIZE = 24, 4


class Noisy(Dataset):
    """Numbers, with noise of every kind if asked for."""

    def __init__(self, noise=0.0):
        generator = torch.Generator().manual_seed(7)
        self.data = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)
        self.data += torch.arange(SAMPLES)[:, None]  # so that the means of batches differ
        self.noise = noise

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        drawn = random.random() + np.random.rand() + torch.rand((), dtype=torch.float64)
        return self.data[index] + self.noise * drawn, index


class Normed:
    """Two linear layers with a batch norm behind each; notes what happens to it."""

    def __init__(self, loader=None):
        super().__init__()
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3)),
            *(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=0.3)),
        ).double()
        self.loader = DataLoader(Noisy(), batch_size=BATCH_SIZE) if loader is None else loader
        self.losses, self.seen, self.validated = [], [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, index = batch
        self.seen.append(index.tolist())
        draws = random.random() + np.random.rand() + torch.rand(()).item()
        loss = (self(x) - draws).pow(2).mean()
        self.losses.append(loss.item())
        return loss

    def on_validation_batch_start(self, batch, batch_idx):
        if not batch_idx and not self.trainer.sanity_checking:
            self.validated.append({name: value.clone() for name, value in self.state_dict().items()})

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self):
        return self.loader

    def val_dataloader(self):
        return DataLoader(Noisy(), batch_size=BATCH_SIZE)

    test_dataloader = val_dataloader


def expected(state, batches):
    """Mean and variance of all inputs of both norms; in a pass, a norm normalizes by its own batch."""
    inputs = {"net.1": [], "net.5": []}
    for x in batches:
        first = x @ state["net.0.weight"].T + state["net.0.bias"]
        inputs["net.1"].append(first)
        first = (first - first.mean(0)) / (first.var(0, correction=0) + 1e-5).sqrt()
        first = (first * state["net.1.weight"] + state["net.1.bias"]).clamp(min=0)
        inputs["net.5"].append(first @ state["net.4.weight"].T + state["net.4.bias"])
    pooled = {name: torch.cat(parts) for name, parts in inputs.items()}
    return {
        **{f"{name}.running_mean": each.mean(0) for name, each in pooled.items()},
        **{f"{name}.running_var": each.var(0) for name, each in pooled.items()},
    }


def assert_precise(state, batches, rtol=1e-12):
    for name, value in expected(state, batches).items():
        torch.testing.assert_close(state[name], value, rtol=rtol, atol=rtol)


def is_precise(state, batches):
    reference = expected(state, batches)
    return all(torch.allclose(state[name], value, rtol=1e-9) for name, value in reference.items())
