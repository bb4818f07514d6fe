"""NovoGrad: momentum on layer-wise normalized gradients (Ginsburg et al. 2019, arXiv:1905.11286)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import COMMON_RULES, Factors, Hyperparameters, PerLayer, Value
from lightning_lars.optim.backends.cpu_sgd import CpuSGD
from lightning_lars.optim.layerwise import LayerwiseOptimizer
from lightning_lars.optim.trust_ratio import TrustRatios, trust_ratio
from lightning_lars.rules import FLAG, NON_NEGATIVE, TWO_FRACTIONS


class NovoGrad(LayerwiseOptimizer):
    """SGD with momentum on gradients that are normalized by a moving average of their layer's norm.

    For each layer, with weights ``w`` and gradient ``g``::

        v = beta2 * v + (1 - beta2) * |g| ** 2
        m = beta1 * m + (g / (sqrt(v) + eps) + weight_decay * w)
        w = w - lr * m

    Ginsburg et al. 2019, Algorithm 1, with lambda for ``lr`` and d for ``weight_decay``. ``v`` is initialized
    to the first ``|g| ** 2`` that is not 0; in the paper, to the first. ``trust_ratios()`` returns
    ``1 / (sqrt(v) + eps)``, or 1 while ``v`` is 0. A group with ``layer_adaptation=False`` has ratio 1 and is
    equivalent to :class:`torch.optim.SGD` with momentum ``beta1``.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either as dicts.
        lr: Learning rate, at least 0; a number or a one-element tensor.
        betas: Decay rates of ``m`` and ``v``, each in [0, 1).
        eps: Added to ``sqrt(v)``, at least 0.
        weight_decay: Decay of the weights, at least 0, which momentum accumulates.
        grad_averaging: Whether to multiply the update of ``m`` by ``1 - beta1``.
        decoupled_weight_decay: Whether to decay the weights first, ``w = (1 - lr * weight_decay) * w``, and
            not in ``m``.
        max_grad_norm: Bound, above 0, on the norm of all finite gradients of all groups.
        maximize: Whether to maximize the objective.
        fused: None uses fused kernels where they are supported (docs/performance.md), True raises
            RuntimeError in ``step()`` where they are not, False never uses them.

    Raises:
        ValueError: If an argument, here or in a group, breaks its rule.

    Example:
        >>> import torch
        >>> from lightning_lars import NovoGrad
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = NovoGrad([("w", w)], lr=0.1)
        >>> w.grad = torch.tensor([0.0, 1000.0])  # of any scale: the first step is lr
        >>> optimizer.step()
        >>> print(w.data, optimizer.trust_ratios()["w"])
        tensor([3.0000, 3.9000]) tensor(0.0010)
    """

    RULES = COMMON_RULES | {"betas": TWO_FRACTIONS, "eps": NON_NEGATIVE, "grad_averaging": FLAG}
    moments = ("exp_avg",)
    cpu = CpuSGD
    norm_moment = "exp_avg_sq"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        grad_averaging: bool = False,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, self.defaults_from(locals()))

    @staticmethod
    def adapts_direction(h: Hyperparameters) -> bool:
        return False

    @staticmethod
    def next_norm_moment(d_norm: Tensor, moment: Tensor, h: Hyperparameters) -> Tensor:
        _, beta2 = h.betas
        v = beta2 * moment + (1 - beta2) * d_norm**2
        return torch.where(moment == 0, d_norm**2, v)

    @staticmethod
    def ratio(w_norm: Any, d_norm: Any, lr: Any, h: Hyperparameters) -> TrustRatios[Any]:
        root = d_norm.sqrt()
        ratio = trust_ratio(torch.ones_like(root), root, eps=h.eps)
        return TrustRatios(torch.ones_like(root), root, ratio, ratio)

    @staticmethod
    def factors(ratio: PerLayer, lr: PerLayer, is_first: bool, t: PerLayer, h: Hyperparameters) -> Factors:
        beta1, _ = h.betas
        return lr, ratio, 1 - beta1 if h.grad_averaging else 1.0

    @staticmethod
    def direction(w: Value, g: Value, m: Value, scale: Value, input_scale: Value, h: Hyperparameters) -> Any:
        beta1, _ = h.betas
        m = beta1 * m + input_scale * (scale * g + h.weight_decay * w)
        return m, m

    @staticmethod
    def decay_only_bounds(h: Hyperparameters) -> tuple[float, float]:
        return 0.0, 0.0  # the ratio does not depend on the weights
