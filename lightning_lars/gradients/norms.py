"""Gradient norms of whole parameters, sharded or not, and scaling of gradients."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_lars.sharding.norms import (
    by_device_and_dtype,
    norm_of_each,
    on_device,
    stacked_norms,
    whole_norms,
)
from lightning_lars.sharding.shards import Shard, local, local_gradient


@torch.no_grad()
def gradient_norms(params: Sequence[Tensor], shards: Mapping[Tensor, Shard], device: torch.device) -> Tensor:
    """Return the L2 norm of the gradient of every parameter, without a device-to-host copy.

    All ranks that hold shards of the parameters must call this, with the parameters in the same order.

    Args:
        params: Parameters, on any devices.
        shards: Their shards, from :func:`~lightning_lars.sharding.shards.find_shards`.
        device: The device of the result.

    Returns:
        Norms of shape ``(len(params),)``, 0 where there is no gradient.

    Example:
        >>> import torch
        >>> from lightning_lars.gradients.norms import gradient_norms
        >>> w, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> gradient_norms([w, b], {}, w.device)
        tensor([5., 0.], dtype=torch.float64)
    """
    with_grad = [p for p in params if p.grad is not None]
    gradients = [values_of(local_gradient(p)) for p in with_grad]
    if len(with_grad) == len(params) and not any(p in shards for p in params):
        return stacked_norms(gradients, device)
    local_norms = norm_of_each(gradients)
    norms = dict(zip(with_grad, local_norms, strict=True))
    sharded = [p for p in params if p in shards and shards[p].groups]
    if sharded:
        whole = whole_norms([norms.get(p) for p in sharded], [shards[p] for p in sharded])
        norms.update(zip(sharded, whole, strict=True))
    zero = torch.zeros((), device=device)
    return on_device([norms.get(p, zero) for p in params], device)


@torch.no_grad()
def scale_gradients(params: Sequence[Tensor], scales: Tensor) -> None:
    """Multiply the gradients, sharded or not, in place, without a device-to-host copy.

    Args:
        params: Parameters, on any devices.
        scales: One for all, shape ``(1,)``, or one for each, shape ``(len(params),)``.
    """
    grads = [None if p.grad is None else _in_place(local(p.grad)) for p in params]
    for (device, dtype), indices in by_device_and_dtype(grads).items():
        these = [grad for i in indices if (grad := grads[i]) is not None]
        wide = torch.promote_types(dtype, torch.float32)
        factors = scales.to(device, wide).unbind()
        torch._foreach_mul_(these, factors[0] if len(factors) == 1 else [factors[i] for i in indices])


def _in_place(grad: Tensor) -> Tensor:
    # Also for an uncoalesced gradient: every addend is scaled.
    return grad._values() if grad.is_sparse else grad


def values_of(grad: Tensor) -> Tensor:
    """Return the elements of a gradient; of a sparse one, those that are stored."""
    return grad.detach().coalesce().values() if grad.is_sparse else grad.detach()
