"""The common base of the back ends on torch's fused CPU kernels."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_lars.optim.backends.eager import Eager
from lightning_lars.optim.batches import Batch

# torch refuses larger numbers, but not infinity, as a factor on float32.
_MAX_RATE = torch.finfo(torch.float32).max


class Cpu(Eager):
    """A back end that takes trust ratios as floats, and can repeat a step on unchanged layers."""

    in_floats: ClassVar[bool] = True
    can_repeat: ClassVar[bool] = True

    def begin(self, batch: Batch) -> None:
        """Begin a step, with these gradients, hyperparameters and learning rate."""
        super().begin(batch)
        self.state.batch = batch

    def end(self) -> None:
        """Release the gradients and the scratch memory until the next step."""
        self.batch = self.state.batch = self.batch._replace(grads=[])
        self.w, self.g = [], []
        self.stored_direction = self.gradient_scale = None


def subtract_scaled(weights: Sequence[Tensor], d: Sequence[Tensor], rates: Sequence[float]) -> None:
    """Apply ``w = w - rate * d`` in place, in one pass over each layer."""
    for w, direction, rate in zip(weights, d, rates, strict=True):
        w.add_(direction, alpha=-math.inf if rate > _MAX_RATE else -rate)
