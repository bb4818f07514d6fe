"""Mean, minimum, maximum and count of quantities of every layer over steps, kept on the device."""

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
    """Mean, minimum, maximum and number of updates, for each quantity of each layer that had a value.

    Every rank has the statistics of whole layers, so no synchronization across ranks is needed. All
    quantities are in one vector, so that a step takes few operations.

    Example:
        >>> import torch
        >>> from lightning_lars.trust_ratios.layer_statistics import LayerStatistics
        >>> statistics = LayerStatistics()
        >>> ratios = [("trust_ratio", "first"), ("trust_ratio", "second")]
        >>> statistics.update(ratios, torch.tensor([1.0, 5.0]))
        >>> statistics.update([("trust_ratio", "first")], torch.tensor([2.0]))
        >>> statistics.labels
        [('trust_ratio', 'first'), ('trust_ratio', 'second')]
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
        self.labels: list[tuple[str, str]] = []
        """Quantity and layer of each column."""
        for state in ("count", "total", "minimum", "maximum"):
            self.add_state(state, torch.zeros(0, device="cpu"), dist_reduce_fx=None)

    def update(self, labels: Sequence[tuple[str, str]], values: Tensor) -> None:
        """Add one step.

        Args:
            labels: Quantities and layers; new ones are appended.
            values: Their values, of shape ``(labels,)``. The first call determines device and dtype, which is
                at least float32: counts are kept in it.
        """
        labels = list(labels)
        if not self.labels:
            empty = values.new_zeros(0, dtype=torch.promote_types(values.dtype, torch.float32))
            self.count, self.total = empty, empty
            self.minimum, self.maximum = empty, empty
        values = values.to(self.total.dtype)  # gradient norms are wider than trust ratios
        is_prefix = labels == self.labels[: len(labels)]
        known = set() if is_prefix else set(self.labels)
        new = [] if is_prefix else [label for label in labels if label not in known]
        if new:
            self.labels = [*self.labels, *new]
            self.count = torch.cat([self.count, self.count.new_zeros(len(new))])
            self.total = torch.cat([self.total, self.total.new_zeros(len(new))])
            self.minimum = torch.cat([self.minimum, self.minimum.new_full((len(new),), torch.inf)])
            self.maximum = torch.cat([self.maximum, self.maximum.new_full((len(new),), -torch.inf)])
        where: Tensor | slice = slice(len(labels))
        if labels != self.labels[: len(labels)]:
            number = {label: i for i, label in enumerate(self.labels)}
            indices = torch.tensor([number[label] for label in labels], device="cpu")
            where = indices.to(values.device, non_blocking=True)
        self.count[where] += 1
        self.total[where] += values
        self.minimum[where] = torch.minimum(self.minimum[where], values)
        self.maximum[where] = torch.maximum(self.maximum[where], values)

    def compute(self) -> Tensor:
        """Return mean, minimum, maximum and number of steps, of shape ``(4, labels)``."""
        return torch.stack([self.total / self.count, self.minimum, self.maximum, self.count])

    def reset(self) -> None:
        """Remove all steps and all labels."""
        super().reset()
        self.labels = []
