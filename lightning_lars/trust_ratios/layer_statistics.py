"""Mean, minimum, maximum and count of a quantity of every layer over steps, kept on the device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class OverSteps(NamedTuple):
    """Statistics of one quantity of one layer over some steps."""

    mean: float
    minimum: float
    maximum: float
    steps: float = 1
    """Number of steps in which it was measured."""


class LayerStatistics(Metric):
    """Mean, minimum, maximum and number of updates, for each layer that had a value.

    Every rank has the statistics of whole layers, so no synchronization across ranks is needed.

    Example:
        >>> import torch
        >>> from lightning_lars.trust_ratios.layer_statistics import LayerStatistics
        >>> statistics = LayerStatistics()
        >>> statistics.update(["first", "second"], torch.tensor([1.0, 5.0]))
        >>> statistics.update(["first"], torch.tensor([2.0]))
        >>> statistics.layers
        ['first', 'second']
        >>> statistics.compute()
        tensor([[1.5000, 5.0000],
                [1.0000, 5.0000],
                [2.0000, 5.0000],
                [2.0000, 1.0000]])
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    minimum: Tensor
    maximum: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        self.layers: list[str] = []
        for state in ("count", "total", "minimum", "maximum"):
            self.add_state(state, torch.zeros(0, device="cpu"), dist_reduce_fx=None)

    def update(self, layers: Sequence[str], values: Tensor) -> None:
        """Add one step.

        Args:
            layers: Names of layers; new ones are appended.
            values: Their values, of shape ``(layers,)``. The first call determines device and dtype.
        """
        if not self.layers:
            self.count, self.total = values.new_zeros(0), values.new_zeros(0)
            self.minimum, self.maximum = values.new_zeros(0), values.new_zeros(0)
        known = set(self.layers)
        new = [layer for layer in layers if layer not in known]
        if new:
            self.layers = [*self.layers, *new]
            self.count = torch.cat([self.count, self.count.new_zeros(len(new))])
            self.total = torch.cat([self.total, self.total.new_zeros(len(new))])
            self.minimum = torch.cat([self.minimum, self.minimum.new_full((len(new),), torch.inf)])
            self.maximum = torch.cat([self.maximum, self.maximum.new_full((len(new),), -torch.inf)])
        where: Tensor | slice = slice(None)
        if list(layers) != self.layers:
            number = {layer: i for i, layer in enumerate(self.layers)}
            indices = torch.tensor([number[layer] for layer in layers], device="cpu")
            where = indices.to(values.device, non_blocking=True)
        self.count[where] += 1
        self.total[where] += values
        self.minimum[where] = torch.minimum(self.minimum[where], values)
        self.maximum[where] = torch.maximum(self.maximum[where], values)

    def compute(self) -> Tensor:
        """Return mean, minimum, maximum and number of steps, of shape ``(4, layers)``."""
        return torch.stack([self.total / self.count, self.minimum, self.maximum, self.count])

    def reset(self) -> None:
        """Remove all steps and all layers."""
        super().reset()
        self.layers = []
