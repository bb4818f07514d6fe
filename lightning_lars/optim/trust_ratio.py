"""The one equation that LARS and LAMB share: for one layer in floats, or for many at once in tensors."""

import math
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_lars.rules import is_pair

Number = TypeVar("Number", float, Tensor)


ROUNDING = 1e-3
"""Relative error that a norm may have, and then some."""


class TrustRatios(NamedTuple, Generic[Number]):
    """The trust ratio of a layer and where it comes from, or those of some layers, of shape ``(layers,)``."""

    weight_norm: Number
    """Before the step, and before anything limits it."""
    denominator: Number
    """What the weights were measured against, before ``eps``."""

    unclipped: Number
    ratio: Number
    """What the step used."""


def at_zero_rule(ratios: TrustRatios[Tensor]) -> Tensor:
    """Tell which ratios are 1 as there was nothing to adapt to."""
    return _no_scale(ratios.weight_norm, ratios.denominator)


def at_clip(ratios: TrustRatios[Tensor]) -> Tensor:
    """Tell which ratios the clip changed."""
    ratio = ratios.ratio
    return (ratio != ratios.unclipped.to(ratio.dtype)) & ~ratio.isnan()


def from_zero(ratios: TrustRatios[Tensor]) -> Tensor:
    """Tell which layers had no weights yet to scale a step by that was not 0."""
    return (ratios.weight_norm == 0) & (ratios.denominator > 0)


def by_decay_alone(ratios: TrustRatios[Tensor], decay: tuple[float, float]) -> Tensor:
    """Tell which weights were measured against no more than their own decay.

    Args:
        ratios: Of layers of one group.
        decay: Least and most of ``denominator / weight_norm`` that weight decay makes by itself.
    """
    least, most = decay
    weight_norm, denominator = ratios.weight_norm, ratios.denominator
    is_no_more = (denominator >= least * weight_norm) & (denominator <= most * weight_norm)
    return is_no_more & (denominator > 0)


def stack_ratios(of_each: Sequence[TrustRatios[float]], dtype: torch.dtype) -> TrustRatios[Tensor]:
    """Return the ratios of some layers on the CPU as tensors, what the step used in this dtype."""
    columns = torch.tensor(of_each, dtype=torch.float64, device="cpu").unbind(1)
    ratios: TrustRatios[Tensor] = TrustRatios(*columns)
    return ratios._replace(ratio=ratios.ratio.to(dtype))


def trust_ratio(
    weight_norm: Number,
    denominator: Number,
    *,
    trust_coefficient: float = 1.0,
    eps: float = 0.0,
) -> Number:
    """Return how far each layer may move, relative to the size of its weights.

    ::

        trust_ratio = trust_coefficient * weight_norm / (denominator + eps)

    A layer whose ``weight_norm`` or ``denominator`` is 0 has no scale to adapt to: its ratio is 1,
    so that zero-initialised layers move and layers without a gradient never turn into NaN.

    Args:
        weight_norm: L2 norm of a layer, or of every layer, shape ``(layers,)``.
        denominator: What the weights are measured against, before ``eps``, likewise.
        trust_coefficient: Factor on every ratio.
        eps: Added to the denominator.

    Returns:
        The ratio, or the ratios, shape ``(layers,)``, on the device of ``weight_norm``.

    Example:
        >>> import torch
        >>> from lightning_lars.optim.trust_ratio import trust_ratio
        >>> trust_ratio(torch.tensor([2.0, 0.0, 3.0]), torch.tensor([4.0, 1.0, 0.0]))
        tensor([0.5000, 1.0000, 1.0000])
        >>> trust_ratio(2.0, 4.0)
        0.5
    """
    if isinstance(weight_norm, (float, int)):  # is faster than to ask for a tensor
        has_no_scale = weight_norm == 0 or denominator == 0
        return 1.0 if has_no_scale else trust_coefficient * weight_norm / (denominator + eps)
    ratio = trust_coefficient * weight_norm / (denominator + eps)
    return ratio.masked_fill(_no_scale(weight_norm, denominator), 1.0)


def clip(ratio: Number, low: float, high: float) -> Number:
    """Return the ratio, or the ratios, within bounds; NaN stays NaN."""
    if isinstance(ratio, Tensor):
        return ratio.clamp(low, high)
    return ratio if math.isnan(ratio) else min(max(ratio, low), high)


def bounds(h: Any) -> tuple[float, float]:
    """Return least and most of the trust ratio, by the hyperparameter ``trust_clip``."""
    if h.trust_clip is None:
        return 0.0, math.inf
    if h.trust_clip == "larc":
        return 0.0, 1.0
    low, high = h.trust_clip if is_pair(h.trust_clip) else (0.0, h.trust_clip)
    return low, high


def over_lr(ratio: Number, lr: float | Tensor) -> Number:
    """Return ``ratio / lr``, infinite at ``lr=0``."""
    if not isinstance(lr, Tensor) and lr == 0:
        return ratio * math.inf
    return ratio / lr  # type: ignore[return-value]  # lr is a tensor only where ratios are


def one_minus_power(beta: float, t: Any) -> Any:
    """Return ``1 - beta ** t``, with digits that the difference loses where ``beta`` is near 1.

    Args:
        beta: Below 1.
        t: A number for each layer, shape ``(layers,)``; or what stands for one in a kernel, and says itself.
    """
    if not isinstance(t, Tensor):
        return t.one_minus_power(beta)
    if torch.compiler.is_compiling():
        # A schedule may change beta in every step: for the logarithm in Python there would be a graph each.
        return -torch.expm1(t * torch.full_like(t[0], beta - 1).log1p())
    return -torch.expm1(t * (math.log(beta) if beta > 0 else -math.inf))


def _no_scale(weight_norm: Tensor, denominator: Tensor) -> Tensor:
    return (weight_norm == 0) | (denominator == 0)
