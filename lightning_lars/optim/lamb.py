"""LAMB: layer-wise adaptive moments (You et al. 2019, arXiv:1904.00962)."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, sqrt

from lightning_lars.optim.algorithm import COMMON_RULES, Factors, Hyperparameters, PerLayer
from lightning_lars.optim.backends.cpu_adam import CpuAdam
from lightning_lars.optim.layerwise import LayerwiseOptimizer
from lightning_lars.optim.trust_ratio import Number, TrustRatios, clip, clipped, one_minus_power, trust_ratio
from lightning_lars.rules import (
    FLAG,
    NON_NEGATIVE,
    NONE_OR_POSITIVE,
    TWO_FRACTIONS,
    Rule,
    is_pair,
    is_positive,
)

CLIP = Rule(
    "None, a number above 0, or a pair (low, high) with 0 <= low <= high and high > 0",
    lambda value: 0 <= value[0] <= value[1] > 0 if is_pair(value) else value is None or is_positive(value),
)


class LAMB(LayerwiseOptimizer):
    """Adam in which the update of every layer is scaled to the norm of its weights.

    For each layer, with weights ``w``, gradient ``g`` and its step number ``t``::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat = m / (1 - beta1 ** t),  v_hat = v / (1 - beta2 ** t)
        u = m_hat / (sqrt(v_hat) + eps) + weight_decay * w
        trust_ratio = min(|w|, max_weight_norm) / (|u| + trust_eps)
        w = w - lr * trust_ratio * u

    You et al. 2019, Algorithm 2, with phi as ``min(|w|, max_weight_norm)``, which is ``|w|`` by default.
    Departure from the paper: where ``|w|`` or ``|u|`` is 0, the ratio is 1 before ``trust_clip``.

    As in the paper, a layer whose gradients are 0 (not None) shrinks by the fraction ``lr`` a step, however
    small its ``weight_decay``; with ``decoupled_weight_decay=True`` by ``lr * weight_decay``. The first step
    of zero-initialized weights is one of Adam with ``lr``, which ``trust_clip`` bounds.

    A group with ``layer_adaptation=False`` has ratio 1 and is equivalent to :class:`torch.optim.AdamW`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either as dicts.
        lr: Learning rate, at least 0; a number or a one-element tensor. The length of a layer's step
            relative to its weights.
        betas: Decay rates of ``m`` and ``v``, each in [0, 1).
        eps: Added to ``sqrt(v_hat)``, at least 0.
        weight_decay: Decay of the weights, at least 0.
        bias_correction: Whether to correct the bias of ``m`` and ``v``; without it, ``m_hat = m`` and
            ``v_hat = v``.
        grad_averaging: Whether to multiply ``g`` by ``1 - beta1`` in ``m``.
        decoupled_weight_decay: Whether to decay the weights first, ``w = (1 - lr * weight_decay) * w``, and
            not in ``u``.
        trust_clip: Upper bound of the trust ratio, above 0, or bounds ``(low, high)``; None for no bounds.
        max_weight_norm: Bound, above 0, on the weight norm in the trust ratio (10 in some implementations).
        trust_eps: Added to ``|u|``, at least 0.
        max_grad_norm: Bound, above 0, on the norm of all finite gradients of all groups.
        maximize: Whether to maximize the objective.
        fused: None uses fused kernels where they are supported (docs/performance.md), True raises
            RuntimeError in ``step()`` where they are not, False never uses them.

    Raises:
        ValueError: If an argument, here or in a group, breaks its rule.

    Example:
        >>> import torch
        >>> from lightning_lars import LAMB
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LAMB([("w", w)], lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([0.0, 1000.0])  # of any scale: the step is 0.1 * |w|
        >>> optimizer.step()
        >>> print(w.data, optimizer.trust_ratios()["w"])
        tensor([3.0000, 3.5000]) tensor(5.0000)
    """

    RULES = COMMON_RULES | {
        "betas": TWO_FRACTIONS,
        "eps": NON_NEGATIVE,
        "bias_correction": FLAG,
        "grad_averaging": FLAG,
        "trust_clip": CLIP,
        "max_weight_norm": NONE_OR_POSITIVE,
        "trust_eps": NON_NEGATIVE,
    }
    moments = ("exp_avg", "exp_avg_sq")
    counts_steps = True
    cpu = CpuAdam

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        decoupled_weight_decay: bool = False,
        trust_clip: float | tuple[float, float] | None = None,
        max_weight_norm: float | None = None,
        trust_eps: float = 0.0,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, self.defaults_from(locals()))

    @staticmethod
    def adapts_direction(h: Hyperparameters) -> bool:
        return True

    @staticmethod
    def ratio(w_norm: Number, d_norm: Number, lr: Any, h: Hyperparameters) -> TrustRatios[Number]:
        numerator = w_norm if h.max_weight_norm is None else clip(w_norm, 0.0, h.max_weight_norm)
        ratio = trust_ratio(numerator, d_norm, eps=h.trust_eps)
        return TrustRatios(w_norm, d_norm, ratio, clipped(ratio, h))

    @staticmethod
    def factors(ratio: PerLayer, lr: PerLayer, is_first: bool, t: PerLayer, h: Hyperparameters) -> Factors:
        beta1, beta2 = h.betas
        input_scale = 1 - beta1 if h.grad_averaging else 1.0, 1 - beta2
        if not h.bias_correction:
            return lr * ratio, *input_scale, 1.0, 1.0
        return lr * ratio, *input_scale, one_minus_power(beta1, t), one_minus_power(beta2, t)

    @staticmethod
    def direction(w, g, m, v, input_scale1, input_scale2, correction1, correction2, h) -> Any:  # type: ignore[no-untyped-def]
        beta1, beta2 = h.betas
        m = beta1 * m + input_scale1 * g
        v = beta2 * v + input_scale2 * g * g
        m_hat = m / correction1
        v_hat = v / correction2
        u = m_hat / (sqrt(v_hat) + h.eps) + h.weight_decay * w
        return u, m, v
