"""The norms of the gradients that the parameters hold, whole even where these are shards."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_lars.sharding.norms import alike, norm_of_each, whole_norms, widest_float
from lightning_lars.sharding.shards import Shard, local, local_gradient


@torch.no_grad()
def gradient_norms(params: Sequence[Tensor], shards: Mapping[Tensor, Shard], device: torch.device) -> Tensor:
    """Return the L2 norm of the gradient of every parameter; nothing comes to the host.

    Processes that hold parts of the parameters must all call this, with the parameters in the same order.

    Args:
        params: Parameters, on any devices.
        shards: What :func:`~lightning_lars.sharding.shards.find_shards` says of them.
        device: Where the norms are wanted.

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
    of_each = norm_of_each([values_of(local_gradient(p)) for p in with_grad])
    norms = dict(zip(with_grad, of_each, strict=True))
    divided = [p for p in params if p in shards and shards[p].groups]
    if divided:
        whole = whole_norms([norms.get(p) for p in divided], [shards[p] for p in divided])
        norms.update(zip(divided, whole, strict=True))
    is_wide = any(norm.dtype == torch.float64 for norm in norms.values())
    dtype = widest_float(device) if is_wide else torch.float32
    zero = torch.zeros((), dtype=dtype, device=device)
    return torch.stack([norms[p].to(zero) if p in norms else zero for p in params])


@torch.no_grad()
def scale_gradients(params: Sequence[Tensor], scales: Tensor) -> None:
    """Multiply the gradients in place, also those that are shards; nothing comes to the host.

    Args:
        params: Parameters, on any devices.
        scales: One for all, shape ``(1,)``, or one for each, shape ``(len(params),)``.
    """
    grads = [None if p.grad is None else _in_place(local(p.grad)) for p in params]
    for (device, dtype), indices in alike(grads).items():
        these = [grad for i in indices if (grad := grads[i]) is not None]
        wide = torch.promote_types(dtype, torch.float32)
        if len(scales) == 1:
            torch._foreach_mul_(these, scales[0].to(device, wide))
        else:
            factors = torch.stack([scales[i] for i in indices])
            torch._foreach_mul_(these, factors.to(device, wide).unbind())


def _in_place(grad: Tensor) -> Tensor:
    # Of an uncoalesced gradient too: every addend is scaled.
    return grad._values() if grad.is_sparse else grad


def values_of(grad: Tensor) -> Tensor:
    """Return what a gradient holds, of a sparse one what it holds beside zeros."""
    return grad.detach().coalesce().values() if grad.is_sparse else grad.detach()
