"""Takes steps with the classes of bitsandbytes as they are installed, compiled library and all."""

import sys

import torch
from torch.nn import Parameter

STEPS = 5
OPTIONS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05}
CASES = {"default": {"max_unorm": 0.02}, "loose": {"max_unorm": 0.5}}
LAMB_OPTIONS = {"lr": 0.05, "weight_decay": 0.0, "eps": 1e-12}
LAMB_CASES = {"default": {"max_unorm": 1.0}, "loose": {"max_unorm": 4.0}}


def start():
    """A large layer, the same every time."""
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(100))


def steps(optimizer, lr_factor=lambda t: 1.0):
    """Yield the layer after every step, with the learning rate times a factor of the number of the step."""
    (group,) = optimizer.param_groups
    (w,) = group["params"]
    lr = group["lr"]
    for step in range(STEPS):
        group["lr"] = lr * lr_factor(step + 1)
        w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        yield w.detach().clone()


def seen(folder):
    """Return the layer after every step, by class and case, as the package in a folder moves it."""
    sys.path.insert(0, folder)
    import bitsandbytes

    runs = [
        (name, case, OPTIONS | options)
        for name in ("LARS", "LARS32bit", "LARS8bit", "PytorchLARS")
        for case, options in CASES.items()
    ]
    runs += [
        (name, case, LAMB_OPTIONS | options)
        for name in ("LAMB", "LAMB32bit", "LAMB8bit")
        for case, options in LAMB_CASES.items()
        if (name, case) != ("LAMB8bit", "loose")  # which it refuses
    ]
    return {
        (name, case): list(steps(getattr(bitsandbytes.optim, name)([Parameter(start())], **options)))
        for name, case, options in runs
    }
