"""Trains with the classes of bitsandbytes as they are installed, and keeps their state dicts."""

import copy
import sys

import torch
from torch.nn import Parameter

SHAPES = ((64, 128), (6,))  # the first in 8 bits where the class has them
STEPS = 3
OPTIONS = {
    "LARS": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05, "max_unorm": 0.02},
    "LARS8bit": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05, "max_unorm": 0.02},
    "PytorchLARS": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05, "max_unorm": 0.02},
    "SGD": {"lr": 0.5, "momentum": 0.9},
    "LAMB": {"lr": 0.05, "weight_decay": 0.0, "eps": 1e-12, "max_unorm": 1.0},
    "LAMB8bit": {"lr": 0.05, "weight_decay": 0.0, "eps": 1e-12, "max_unorm": 1.0},
    "AdamW": {"lr": 0.05, "weight_decay": 0.01},
    "AdamW8bit": {"lr": 0.05, "weight_decay": 0.01},
}


def start():
    """Two layers, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def walk(optimizer, steps):
    """Take the steps of these numbers."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach().clone() for p in params]


def seen(folder):
    """Return by class, of the package in a folder, the layers, the state dict, and the layers at the end."""
    sys.path.insert(0, folder)
    import bitsandbytes

    seen = {}
    for name, options in OPTIONS.items():
        optimizer = getattr(bitsandbytes.optim, name)(start(), **options)
        weights = walk(optimizer, range(STEPS))
        state_dict = copy.deepcopy(optimizer.state_dict())
        seen[name] = weights, state_dict, walk(optimizer, range(STEPS, 2 * STEPS))
    return seen
