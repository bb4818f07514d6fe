"""Mean and variance of all inputs of a batch normalization layer, over batches and across ranks."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_lars.sharding.norms import widest_float


class PopulationStatistics:
    """Accumulates the statistics of all inputs of a layer, batch by batch.

    ::

        running_mean = mean(x)
        running_var  = var(x)         unbiased; within the batches, and between their means

    Wu and Johnson 2021, arXiv:2105.07576. The layer computes the statistics of a batch anyway: its inputs are
    not read again, and nothing is copied to the host.

    Args:
        layer: In train mode, with ``track_running_stats=True``. Its running statistics and momentum are
            overwritten between :meth:`watch` and the removal of the hooks.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.count = 0
        """Inputs per channel so far, on this rank."""
        mean, _ = self._running()
        self.mean = torch.zeros_like(mean, dtype=widest_float(mean.device))
        self.squares = torch.zeros_like(self.mean)
        """Sum of squared deviations from the mean."""

    def watch(self) -> list[RemovableHandle]:
        """Accumulate statistics until the returned hooks are removed."""
        return [
            self.layer.register_forward_pre_hook(self._keep_the_batch),
            self.layer.register_forward_hook(self._add_the_batch),
        ]

    def write(self, total: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Set the layer's running statistics, unless no rank has seen an input."""
        for running, new in zip(self._running(), (mean, variance), strict=True):
            running.copy_(torch.where(total > 0, new, running))

    def _running(self) -> tuple[Tensor, Tensor]:
        return cast(Tensor, self.layer.running_mean), cast(Tensor, self.layer.running_var)

    def _keep_the_batch(self, *_: Any) -> None:
        # With this momentum, the running statistics equal the statistics of the last batch.
        self.layer.momentum = 1.0

    def _add_the_batch(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        count = output.numel() // output.size(1)
        # SyncBatchNorm's cover all ranks, which get the same number of inputs from Lightning's samplers.
        in_variance = count * _synchronized(self.layer)
        mean, variance = (running.to(self.mean) for running in self._running())
        biased = variance * ((in_variance - 1) / in_variance)
        total = self.count + count
        shift = mean - self.mean
        self.squares += count * biased + shift.square() * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total


def pool(statistics: Sequence[PopulationStatistics], all_reduce: Callable[[Tensor], Tensor]) -> None:
    """Set the running statistics of every layer to the statistics over the inputs of all ranks.

    Args:
        statistics: The same layers on all ranks, in the same order.
        all_reduce: Sums a tensor over the ranks; called three times for all layers together.
    """
    count = torch.cat([torch.full_like(each.mean, each.count) for each in statistics])
    mean = torch.cat([each.mean for each in statistics])
    squares = torch.cat([each.squares for each in statistics])
    total = all_reduce(count.clone())
    pooled = all_reduce(count * mean) / total
    variance = all_reduce(squares + count * (mean - pooled).square()) / (total - 1)
    sizes = [each.mean.numel() for each in statistics]
    per_layer = [torch.split(values, sizes) for values in (total, pooled, variance)]
    for each, *values in zip(statistics, *per_layer, strict=True):
        each.write(*values)


def _synchronized(layer: _BatchNorm) -> int:
    """Return the number of ranks whose inputs enter the statistics that a layer computes."""
    if isinstance(layer, nn.SyncBatchNorm) and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(layer.process_group)
    return 1
