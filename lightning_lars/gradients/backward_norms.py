"""The gradient norm of each backward pass, before the gradient is accumulated or averaged across ranks."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_lars.gradients.norms import values_of
from lightning_lars.sharding.norms import by_device_and_dtype, layer_norms, widest_float


class BackwardNorms:
    """Records the squared norm of the gradient that each backward pass adds to ``p.grad``.

    Hooks on the parameters see it before it is accumulated, and before DistributedDataParallel averages it.
    No gradient is kept, ``p.grad`` is not modified, and nothing is copied to the host.

    Args:
        params: Leaf tensors, at least one, all on one device. Frozen parameters are skipped.

    Example:
        >>> import torch
        >>> from lightning_lars.gradients.backward_norms import BackwardNorms
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> norms = BackwardNorms([w])
        >>> for slope in (3.0, 4.0):
        ...     (slope * w[0]).backward()
        ...     norms.end_pass()
        >>> norms.remove()
        >>> [square.item() for square in norms.squares], norms.accumulated().item()
        ([9.0, 16.0], 49.0)
    """

    def __init__(self, params: Iterable[Parameter]) -> None:
        params = list(params)
        self._device = params[0].device
        self._params = [p for p in params if p.requires_grad]
        self.squares: list[Tensor] = []
        """One 0-d tensor for each pass."""
        self.in_parts = False
        """Whether a gradient arrived in parts, whose norms do not determine the norm of their sum."""
        self._norms: dict[int, Tensor] = {}
        self._hooks = [
            cast(Any, p).register_hook(partial(self._record, i)) for i, p in enumerate(self._params)
        ]

    def end_pass(self) -> None:
        """Record the gradients since the last call as one pass."""
        norms, self._norms = self._norms, {}
        self.squares.append(self._sum_of_squares(list(norms.values())))

    def accumulated(self) -> Tensor:
        """Return the squared norm of ``p.grad``, 0-d."""
        grads = [values_of(p.grad) for p in self._params if p.grad is not None]
        norms = [layer_norms([grads[i] for i in indices]) for indices in by_device_and_dtype(grads).values()]
        return self._sum_of_squares(norms)

    def remove(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _record(self, index: int, grad: Tensor) -> None:
        self.in_parts |= index in self._norms
        self._norms[index] = layer_norms([values_of(grad)])

    def _sum_of_squares(self, norms: Sequence[Tensor]) -> Tensor:
        dtype = widest_float(self._device)
        if not norms:
            return torch.zeros((), device=self._device, dtype=dtype)
        return torch.cat(list(norms)).to(dtype).square().sum()
