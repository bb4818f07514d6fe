"""Norms of the change of every layer in a step, sharded or not."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_lars.sharding.norms import norm_of_each, stacked_norms, whole_norms
from lightning_lars.sharding.shards import Shard, local


@torch.no_grad()
def update_norms(
    params: Sequence[Tensor], before: Mapping[Tensor, Tensor], shards: Mapping[Tensor, Shard]
) -> tuple[Tensor, Tensor]:
    """Return the L2 norm of the change of every parameter in a step, and of the parameter after it.

    All ranks that hold shards of the parameters must call this, with the parameters in the same order.

    Args:
        params: Parameters after the step.
        before: Copies of their local shards before the step, which this may overwrite.
        shards: From :func:`~lightning_lars.sharding.shards.find_shards`.

    Returns:
        Two tensors of shape ``(len(params),)``.

    Example:
        >>> import torch
        >>> from lightning_lars.trust_ratios.update_norms import update_norms
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> change, weights = update_norms([w], {w: torch.tensor([3.0, 3.0])}, {})
        >>> print(change.tolist(), weights.tolist())
        [1.0] [5.0]
    """
    after = [local(p) for p in params]
    # In place in the copy, if that is in single precision.
    change = [before[p].float() for p in params]
    torch._foreach_sub_(change, after)
    if not any(p in shards for p in params):
        device = params[0].device
        return stacked_norms(change, device), stacked_norms(after, device)
    of_params = [shards.get(p, Shard((), p.device)) for p in params]
    norms = whole_norms(norm_of_each([*change, *after]), [*of_params, *of_params])
    of_change, of_weights = torch.stack([norm.to(norms[0]) for norm in norms]).view(2, -1)
    return of_change, of_weights
