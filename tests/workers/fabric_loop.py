"""A loop of Lightning Fabric, and the same in plain torch."""

from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import nn

from lightning_lars import LAMB, LARS, WarmupDecayLR, build_optimizer
from tests.support.small_network import deviation

STEPS, RESUMED = 5, 3
OPTIMIZERS = {
    "LARS": (LARS, {"lr": 2.0, "weight_decay": 0.1, "excluded_lr": 0.05}),
    "LAMB": (LAMB, {"lr": 0.05, "weight_decay": 0.1, "max_grad_norm": 0.5}),
}


def made(of):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2))
    optimizer_class, options = OPTIMIZERS[of]
    optimizer = build_optimizer(model, optimizer_class, **options)
    return model, optimizer, WarmupDecayLR(optimizer, warmup_steps=2, total_steps=STEPS)


def data():
    return torch.randn(STEPS, 8, 4, generator=torch.Generator().manual_seed(1))


def loss_of(model, batch):
    return (model(batch) - 1).pow(2).mean()


def with_torch(of):
    """The parameters after every step, and the trust ratios of the last."""
    model, optimizer, scheduler = made(of)
    seen = []
    for batch in data():
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        scheduler.step()
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return seen, {name: ratio.item() for name, ratio in optimizer.trust_ratios().items()}


def with_fabric(of, folder, strategy="auto"):
    """The largest deviation from plain torch after every step, before and after a resume, and the ratios."""
    expected, _ = with_torch(of)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
    fabric.launch()
    deviations = []

    def state():
        model, optimizer, scheduler = made(of)
        model, optimizer = fabric.setup(model, optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def train(state, steps):
        for step in steps:
            state["optimizer"].zero_grad()
            fabric.backward(loss_of(state["model"], data()[step].chunk(ranks)[rank]))
            state["optimizer"].step()
            state["scheduler"].step()
            actual = {name: p.detach() for name, p in state["model"].module.named_parameters()}
            deviations.append(deviation(actual, expected[step]))

    path = Path(folder) / f"{of}.ckpt"
    first = state()
    train(first, range(RESUMED))
    fabric.save(path, first)
    fabric.barrier()
    again = state()
    fabric.load(path, again)
    train(again, range(RESUMED, STEPS))
    ratios = {name: ratio.item() for name, ratio in again["optimizer"].trust_ratios().items()}
    return deviations, ratios
