"""The trust ratio, for one layer as floats or for many layers as tensors."""

import math
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_lars.rules import is_pair

Number = TypeVar("Number", float, Tensor)


ROUNDING = 1e-3
"""Relative tolerance for the rounding error of norms."""


class TrustRatios(NamedTuple, Generic[Number]):
    """The trust ratio of one layer, or of several in shape ``(layers,)``, and how it was computed."""

    weight_norm: Number
    """The norm of the weights before the step, not limited by ``max_weight_norm``."""
    denominator: Number
    """The divisor of the weight norm, without ``eps``."""

    unclipped: Number
    """The trust ratio before ``trust_clip``."""

    ratio: Number
    """The trust ratio that the step uses."""


def at_zero_rule(ratios: TrustRatios[Tensor]) -> Tensor:
    """Return which ratios are 1 because the weight norm or the denominator is 0."""
    return _no_scale(ratios.weight_norm, ratios.denominator)


def at_clip(ratios: TrustRatios[Tensor]) -> Tensor:
    """Return which ratios were clipped."""
    ratio = ratios.ratio
    return (ratio != ratios.unclipped.to(ratio.dtype)) & ~ratio.isnan()


def from_zero(ratios: TrustRatios[Tensor]) -> Tensor:
    """Return which layers had only weights of 0 and a denominator that was not 0."""
    return (ratios.weight_norm == 0) & (ratios.denominator > 0)


def by_decay_alone(ratios: TrustRatios[Tensor], decay: tuple[float, float]) -> Tensor:
    """Return which denominators are explained by weight decay alone.

    Args:
        ratios: The trust ratios of layers of one group.
        decay: Bounds of ``denominator / weight_norm`` where only weight decay contributes.
    """
    least, most = decay
    weight_norm, denominator = ratios.weight_norm, ratios.denominator
    is_no_more = (denominator >= least * weight_norm) & (denominator <= most * weight_norm)
    return is_no_more & (denominator > 0)


def stack_ratios(ratios_of_layers: Sequence[TrustRatios[float]], dtype: torch.dtype) -> TrustRatios[Tensor]:
    """Return ratios of layers on the CPU as tensors; the one that the step uses has this dtype."""
    columns = torch.tensor(ratios_of_layers, dtype=torch.float64, device="cpu").unbind(1)
    ratios: TrustRatios[Tensor] = TrustRatios(*columns)
    return ratios._replace(ratio=ratios.ratio.to(dtype))


def trust_ratio(
    weight_norm: Number,
    denominator: Number,
    *,
    trust_coefficient: float = 1.0,
    eps: float = 0.0,
) -> Number:
    """Return the trust ratio, which scales the update of a layer.

    ::

        trust_ratio = trust_coefficient * weight_norm / (denominator + eps)

    Where ``weight_norm`` or ``denominator`` is 0, the ratio is 1, so that zero-initialized layers are
    updated, and a gradient of 0 never makes NaN.

    Args:
        weight_norm: L2 norm of the weights of a layer, or of several layers, shape ``(layers,)``.
        denominator: The divisor of the norm, without ``eps``, in the same shape.
        trust_coefficient: Factor on the ratio.
        eps: Added to the denominator.

    Returns:
        A float, or a tensor of shape ``(layers,)`` on the device of ``weight_norm``.

    Example:
        >>> import torch
        >>> from lightning_lars.optim.trust_ratio import trust_ratio
        >>> trust_ratio(torch.tensor([2.0, 0.0, 3.0]), torch.tensor([4.0, 1.0, 0.0]))
        tensor([0.5000, 1.0000, 1.0000])
        >>> trust_ratio(2.0, 4.0)
        0.5
    """
    if isinstance(weight_norm, (float, int)):  # faster than isinstance(..., Tensor)
        has_no_scale = weight_norm == 0 or denominator == 0
        return 1.0 if has_no_scale else trust_coefficient * weight_norm / (denominator + eps)
    ratio = trust_coefficient * weight_norm / (denominator + eps)
    return ratio.masked_fill(_no_scale(weight_norm, denominator), 1.0)


def clip(ratio: Number, low: float, high: float) -> Number:
    """Limit a ratio, or a tensor of ratios, to ``[low, high]``; NaN stays NaN."""
    if isinstance(ratio, Tensor):
        return ratio.clamp(low, high)
    return ratio if math.isnan(ratio) else min(max(ratio, low), high)


def clipped(ratio: Number, h: Any) -> Number:
    """Return a ratio, or a tensor of ratios, within the bounds that ``trust_clip`` sets."""
    return ratio if h.trust_clip is None else clip(ratio, *bounds(h.trust_clip))


def bounds(limit: Any) -> tuple[float, float]:
    """Return the lower and upper bound that a number, a pair of numbers or ``"larc"`` sets."""
    if limit == "larc":
        return 0.0, 1.0
    return limit if is_pair(limit) else (0.0, limit)


def over_lr(ratio: Number, lr: float | Tensor) -> Number:
    """Return ``ratio / lr``, infinite at ``lr=0``."""
    if not isinstance(lr, Tensor) and lr == 0:
        return ratio * math.inf
    return ratio / lr  # type: ignore[return-value]  # lr is a tensor only where ratios are


def one_minus_power(beta: float, t: Any) -> Any:
    """Return ``1 - beta ** t``, without cancellation where ``beta`` is near 1.

    Args:
        beta: Below 1.
        t: The number of steps of each layer, shape ``(layers,)``; or a kernel object with this method.
    """
    if not isinstance(t, Tensor):
        return t.one_minus_power(beta)
    if torch.compiler.is_compiling():
        # A schedule may change beta in every step, and math.log would recompile the graph for each value.
        return -torch.expm1(t * torch.full_like(t[0], beta - 1).log1p())
    return -torch.expm1(t * (math.log(beta) if beta > 0 else -math.inf))


def _no_scale(weight_norm: Tensor, denominator: Tensor) -> Tensor:
    return (weight_norm == 0) | (denominator == 0)
