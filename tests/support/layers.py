"""A few named layers, adapted and excluded, and a gradient for each in every step."""

import torch
from torch.nn import Parameter

SHAPES = {"conv.weight": (4, 3, 3, 3), "linear.weight": (5, 7), "scale": (), "norm.bias": (5,)}
EXCLUDED = ("norm.bias",)


def layers(dtype=torch.float32):
    """The same parameters at every call, by name."""
    generator = torch.Generator().manual_seed(0)
    return {name: Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in SHAPES.items()}


def groups(params):
    """An adapted and an excluded group of (name, parameter) pairs."""
    adapted = [(name, p) for name, p in params.items() if name not in EXCLUDED]
    excluded = [(name, p) for name, p in params.items() if name in EXCLUDED]
    apart = {"params": excluded, "layer_adaptation": False, "weight_decay": 0.0}
    return [{"params": adapted}, apart] if excluded else [{"params": adapted}]


def give_gradients(params, step):
    """Set the gradients of a step, the same at every call."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def walk(optimizer, steps):
    """Step with the gradients of these steps, under a learning rate that changes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        give_gradients(params, step)
        for group in optimizer.param_groups:
            lr = 0.1 / (1 + step)
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], torch.Tensor) else lr
        optimizer.step()


def values(params):
    """Copies of the parameters, to compare with later."""
    return {name: p.detach().clone() for name, p in params.items()}
