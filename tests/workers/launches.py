"""Launch kernels for the first time and again, without a GPU; print whether their arguments differ."""

import json

import numpy as np
import torch

from benchmarks.absent_gpu import AbsentGPU
from benchmarks.host_time import layers
from lightning_lars import LAMB, LARS


def plain(value):
    """An argument with the value of constants, and the dtype, shape and alignment of tensors."""
    if isinstance(value, tuple):
        return [type(value).__name__, *map(plain, value)]
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), *value.shape, value.data_ptr() % 16]
    return str(getattr(value, "value", value))


def launched_by(optimizer_class, **options):
    """The launches of each of four steps, and whether the last took over what it had launched before."""
    params = layers(5)
    groups = [{"params": params[:3]}, {"params": params[3:], "layer_adaptation": False}]
    optimizer = optimizer_class(groups, fused=True, **options)
    of_steps = []
    for _ in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        driver.launches.clear()
        optimizer.step()
        of_steps.append([[kernel, list(map(plain, args))] for kernel, args in driver.launches])
    return of_steps, optimizer._plan is not None and bool(optimizer._plan.backends[0].launches._known)


if __name__ == "__main__":
    driver = AbsentGPU.install()
    results = {}
    for name, optimizer_class, options in (
        ("lars", LARS, {"trust_clip": 0.5, "max_grad_norm": 1.0}),
        ("lamb", LAMB, {"lr": torch.tensor([0.0, 0.1])[1]}),
        ("floats", LARS, {"lr": 1.0, "weight_decay": 1.0}),
        ("ints", LARS, {"lr": 1, "weight_decay": 1}),
        ("of NumPy", LARS, {"lr": np.float32(1), "weight_decay": np.float32(1)}),
    ):
        of_steps, repeated = launched_by(optimizer_class, **options)
        results[name] = {
            "launches": [kernel for kernel, _ in of_steps[3]],
            "arguments": of_steps[3],
            "differ": of_steps[1] != of_steps[2] or of_steps[1] != of_steps[3],
            "repeated": repeated,
        }
    print(json.dumps(results))
