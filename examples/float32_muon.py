"""Muon that computes in the precision of its parameters, for CPUs."""

from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode


class Float32Muon(torch.optim.Muon):
    """``torch.optim.Muon`` without its conversion to bfloat16.

    Muon orthogonalizes in bfloat16, which a CPU without such instructions emulates: a step of the study's MLP
    takes ten times as long as in float32.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step, as ``torch.optim.Muon``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with _KeepPrecision():
            super().step()
        return loss


class _KeepPrecision(TorchFunctionMode):
    """Turns ``Tensor.bfloat16()`` into a copy in the same precision."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].clone()
        return func(*args, **(kwargs or {}))
