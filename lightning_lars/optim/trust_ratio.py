"""The one equation that LARS and LAMB share, for all layers at once."""

from typing import NamedTuple

import torch
from torch import Tensor


class TrustRatios(NamedTuple):
    """The trust ratios of some layers, and where they come from; all of shape ``(layers,)``."""

    weight_norm: Tensor
    denominator: Tensor
    """What the weights were measured against, before ``eps``."""

    unclipped: Tensor
    ratio: Tensor
    """What the step used."""

    @property
    def no_scale(self) -> Tensor:
        """Where the ratio is 1 as there was nothing to adapt to."""
        return _no_scale(self.weight_norm, self.denominator)

    @property
    def is_clipped(self) -> Tensor:
        """Where the clip changed the ratio."""
        return (self.ratio != self.unclipped.to(self.ratio.dtype)) & ~self.ratio.isnan()


def trust_ratio(
    weight_norm: Tensor,
    denominator: Tensor,
    *,
    trust_coefficient: float = 1.0,
    eps: float = 0.0,
) -> Tensor:
    """Return how far each layer may move, relative to the size of its weights.

    ::

        trust_ratio = trust_coefficient * weight_norm / (denominator + eps)

    A layer whose ``weight_norm`` or ``denominator`` is 0 has no scale to adapt to: its ratio is 1,
    so that zero-initialised layers move and layers without a gradient never turn into NaN.

    Args:
        weight_norm: L2 norm of every layer, shape ``(layers,)``.
        denominator: What the weights are measured against, before ``eps``, shape ``(layers,)``.
        trust_coefficient: Factor on every ratio.
        eps: Added to the denominator.

    Returns:
        The ratios, shape ``(layers,)``, on the device of ``weight_norm``.

    Example:
        >>> import torch
        >>> from lightning_lars.optim.trust_ratio import trust_ratio
        >>> trust_ratio(torch.tensor([2.0, 0.0, 3.0]), torch.tensor([4.0, 1.0, 0.0]))
        tensor([0.5000, 1.0000, 1.0000])
    """
    ratio = trust_coefficient * weight_norm / (denominator + eps)
    return torch.where(_no_scale(weight_norm, denominator), torch.ones_like(ratio), ratio)


def _no_scale(weight_norm: Tensor, denominator: Tensor) -> Tensor:
    return (weight_norm == 0) | (denominator == 0)
