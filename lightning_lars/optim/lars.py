"""LARS: layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, arXiv:1708.03888)."""

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from lightning_lars.optim.algorithm import COMMON_RULES, Factors, Hyperparameters, PerLayer, Value
from lightning_lars.optim.backends.cpu_sgd import CpuSGD
from lightning_lars.optim.layerwise import LayerwiseOptimizer
from lightning_lars.optim.trust_ratio import Number, TrustRatios, clipped, over_lr, trust_ratio
from lightning_lars.rules import FLAG, FRACTION, NON_NEGATIVE, POSITIVE, one_of, positive_or, require


class LARS(LayerwiseOptimizer):
    """SGD with momentum in which every layer has a learning rate of its own.

    For each layer, with weights ``w`` and gradient ``g``::

        trust_ratio = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)
        u = trust_ratio * (g + weight_decay * w)
        v = momentum * v + (1 - dampening) * u
        w = w - lr * (u + momentum * v  if nesterov else  v)

    You et al. 2017, Algorithm 1, with eta for ``trust_coefficient``, beta for ``weight_decay`` and lambda for
    the trust ratio. Departures from the paper: ``lr`` multiplies ``v`` when it is applied, as in
    :class:`torch.optim.SGD`, which differs while ``lr`` changes (the paper's: ``lr_in_momentum=True``); the
    first ``v`` is ``u`` without dampening; the ratio is 1, before ``trust_clip``, where ``|w|`` or the
    denominator without ``eps`` is 0, so that the first step of zero-initialized weights is one of SGD.
    As in the paper, a layer whose gradient is 0 (not None) shrinks by the fraction ``trust_coefficient * lr``
    a step, however small its ``weight_decay``; with ``decoupled_weight_decay=True`` by ``lr * weight_decay``.
    A group with ``layer_adaptation=False`` has ratio 1 and is equivalent to :class:`torch.optim.SGD`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either as dicts.
        lr: Learning rate, at least 0; a number or a one-element tensor. With the default
            ``trust_coefficient``, good values are about a thousand times those of ``torch.optim.SGD``.
        momentum: Momentum factor, in [0, 1).
        weight_decay: L2 penalty, at least 0.
        dampening: Dampening of the momentum, in [0, 1).
        nesterov: Whether to use Nesterov momentum; requires momentum.
        trust_coefficient: The length of a layer's step relative to its weights at ``lr=1``, above 0.
        eps: Added to the denominator, at least 0.
        denominator: The denominator of the trust ratio. ``"gradient"``: as above. ``"decayed_gradient"``:
            ``|g + weight_decay * w| + eps`` (SimCLR, BYOL, optax). ``"momentum"``: momentum runs first, on
            that decayed gradient; its direction ``d``, Nesterov's included, is then applied as
            ``w = w - lr * trust_coefficient * |w| / (|d| + eps) * d``.
        trust_clip: Upper bound of the trust ratio, above 0; None for no bound. ``"larc"`` replaces the ratio
            by ``min(trust_ratio / lr, 1)``, so that no layer has a higher rate than ``lr``.
        lr_in_momentum: Whether ``v = momentum * v + (1 - dampening) * lr * u`` and ``w = w - v``.
        decoupled_weight_decay: Whether to decay ``w = (1 - lr * weight_decay) * w`` first, and not in ``u``.
        max_grad_norm: Bound, above 0, on the norm of all finite gradients of all groups.
        maximize: Whether to maximize the objective.
        fused: None uses fused kernels where they are supported (docs/performance.md), True raises
            RuntimeError in ``step()`` where they are not, False never uses them.

    Raises:
        ValueError: If an argument, here or in a group, breaks its rule.

    Example:
        >>> import torch
        >>> from lightning_lars import LARS
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LARS([("w", w)], lr=1.0, trust_coefficient=0.1)
        >>> w.grad = torch.tensor([0.0, 1000.0])  # of any scale: the step is 0.1 * |w|
        >>> optimizer.step()
        >>> print(w.data, optimizer.trust_ratios()["w"])
        tensor([3.0000, 3.5000]) tensor(0.0005)
    """

    RULES = COMMON_RULES | {
        "momentum": FRACTION,
        "dampening": FRACTION,
        "nesterov": FLAG,
        "trust_coefficient": POSITIVE,
        "eps": NON_NEGATIVE,
        "denominator": one_of("gradient", "decayed_gradient", "momentum"),
        "trust_clip": positive_or("larc"),
        "lr_in_momentum": FLAG,
    }
    moments = ("momentum_buffer",)
    cpu = CpuSGD

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        dampening: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        denominator: Literal["gradient", "decayed_gradient", "momentum"] = "gradient",
        trust_clip: float | Literal["larc"] | None = None,
        lr_in_momentum: bool = False,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, self.defaults_from(locals()))

    @staticmethod
    def check_combination(h: Hyperparameters) -> None:
        def refuse(name: str, where: str) -> None:
            value = getattr(h, name)
            require(name, f"{type(value)()} {where}", value, not value)

        if not LARS.used_moments(h):
            for name in ("nesterov", "lr_in_momentum", "dampening"):
                refuse(name, "unless momentum is above 0")
        if LARS.adapts_direction(h):
            refuse("lr_in_momentum", 'with denominator="momentum", where lr would cancel out of the step')

    @classmethod
    def used_moments(cls, h: Hyperparameters) -> tuple[str, ...]:
        return cls.moments if h.momentum else ()

    @staticmethod
    def adapts_direction(h: Hyperparameters) -> bool:
        return bool(h.denominator == "momentum")

    @staticmethod
    def denominator_vector(w: Value, g: Value, h: Hyperparameters) -> Value:
        return g + h.weight_decay * w if h.denominator == "decayed_gradient" else g

    @staticmethod
    def ratio(w_norm: Number, d_norm: Number, lr: Any, h: Hyperparameters) -> TrustRatios[Number]:
        if h.denominator == "gradient":
            d_norm = d_norm + h.weight_decay * w_norm
        ratio = trust_ratio(w_norm, d_norm, trust_coefficient=h.trust_coefficient, eps=h.eps)
        if h.trust_clip == "larc":
            ratio = over_lr(ratio, lr)
        return TrustRatios(w_norm, d_norm, ratio, clipped(ratio, h))

    @staticmethod
    def factors(ratio: PerLayer, lr: PerLayer, is_first: bool, t: PerLayer, h: Hyperparameters) -> Factors:
        input_scale = 1.0 if is_first else 1 - h.dampening  # the first v is u
        if LARS.adapts_direction(h):
            return lr * ratio, 1.0, input_scale
        if h.lr_in_momentum:
            return 1.0, lr * ratio, input_scale
        return lr, ratio, input_scale

    @staticmethod
    def direction(w: Value, g: Value, v: Value, scale: Value, input_scale: Value, h: Hyperparameters) -> Any:
        u = scale * (g + h.weight_decay * w)
        v = h.momentum * v + input_scale * u
        d = u + h.momentum * v if h.nesterov else v
        return d, v

    @staticmethod
    def decay_only_bounds(h: Hyperparameters) -> tuple[float, float]:
        if not (LARS.used_moments(h) and LARS.adapts_direction(h)):
            return LayerwiseOptimizer.decay_only_bounds(h)
        # v grows from weight_decay * w to this bound, which w may shrink below meanwhile.
        return 0.0, 1.25 * h.weight_decay * (1 - h.dampening) / (1 - h.momentum)
