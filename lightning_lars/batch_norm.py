"""Mean and variance of all that a batch normalization layer is given: over batches, and over processes."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_lars.sharding.norms import widest_float


class PopulationStatistics:
    """Gathers the statistics of all inputs of a layer, while it is watched, from those of each batch.

    ::

        running_mean = mean(x)
        running_var  = var(x)         unbiased; within the batches, and between their means

    Wu and Johnson 2021, arXiv:2105.07576. The layer computes the statistics of a batch anyway: its inputs are
    not read again, and nothing comes to the host.

    Args:
        layer: In train mode, with ``track_running_stats=True``. Its running statistics and its momentum are
            written to while it is watched.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.count = 0
        """Inputs of a channel so far, in this process."""
        mean, _ = self._running()
        self.mean = torch.zeros_like(mean, dtype=widest_float(mean.device))
        self.squares = torch.zeros_like(self.mean)
        """Sum of squared deviations from the mean."""

    def watch(self) -> list[RemovableHandle]:
        """Gather from now on, until the hooks are removed."""
        return [
            self.layer.register_forward_pre_hook(self._keep_the_batch),
            self.layer.register_forward_hook(self._add_the_batch),
        ]

    def write(self, total: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Make these the layer's running statistics, unless no process has seen an input."""
        for running, new in zip(self._running(), (mean, variance), strict=True):
            running.copy_(torch.where(total > 0, new, running))

    def _running(self) -> tuple[Tensor, Tensor]:
        return cast(Tensor, self.layer.running_mean), cast(Tensor, self.layer.running_var)

    def _keep_the_batch(self, *_: Any) -> None:
        # With this momentum, running statistics are those of the last batch.
        self.layer.momentum = 1.0

    def _add_the_batch(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        count = output.numel() // output.size(1)
        # SyncBatchNorm's are those of all processes, which Lightning's samplers give as many inputs each.
        in_variance = count * _synchronized(self.layer)
        mean, variance = (running.to(self.mean) for running in self._running())
        biased = variance * ((in_variance - 1) / in_variance)
        total = self.count + count
        shift = mean - self.mean
        self.squares += count * biased + shift.square() * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total


def pool(statistics: Sequence[PopulationStatistics], add_up: Callable[[Tensor], Tensor]) -> None:
    """Make the statistics of all processes the running statistics of every layer.

    Args:
        statistics: The same layers on all processes, in the same order.
        add_up: Sums a tensor over the processes; called three times for all layers together.
    """
    count = torch.cat([torch.full_like(each.mean, each.count) for each in statistics])
    mean = torch.cat([each.mean for each in statistics])
    squares = torch.cat([each.squares for each in statistics])
    total = add_up(count.clone())
    pooled = add_up(count * mean) / total
    variance = add_up(squares + count * (mean - pooled).square()) / (total - 1)
    sizes = [each.mean.numel() for each in statistics]
    parts = [torch.split(values, sizes) for values in (total, pooled, variance)]
    for each, *of_layer in zip(statistics, *parts, strict=True):
        each.write(*of_layer)


def _synchronized(layer: _BatchNorm) -> int:
    """Return how many processes' inputs are in the statistics that a layer computes."""
    if isinstance(layer, nn.SyncBatchNorm) and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(layer.process_group)
    return 1
