"""LAMB: layer-wise adaptive moments (You et al. 2019, arXiv:1904.00962)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from lightning_lars.optim.backends.cpu import adam_direction, subtract_scaled
from lightning_lars.optim.backends.triton_table import LayerTable
from lightning_lars.optim.layers import Layers
from lightning_lars.optim.layerwise import SHARED, LayerwiseOptimizer, subtract
from lightning_lars.optim.trust_ratio import ROUNDING, Number, TrustRatios, clip, trust_ratio
from lightning_lars.rules import FLAG, NON_NEGATIVE, NONE_OR_POSITIVE, Rule, is_number
from lightning_lars.sharding.norms import Tensors, accumulation_dtype
from lightning_lars.sharding.shards import laid_out_as, local


def is_pair(value: object) -> TypeGuard[tuple[float, float]]:
    """Tell whether the value is two numbers, in a tuple or, as YAML gives them, in a list."""
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(is_number, value))


BETAS = Rule("two numbers in [0, 1)", lambda value: is_pair(value) and all(0 <= beta < 1 for beta in value))
CLIP = Rule(
    "None, a number above 0, or a pair (low, high) with 0 <= low <= high and high > 0",
    lambda value: (
        0 <= value[0] <= value[1] > 0 if is_pair(value) else value is None or (is_number(value) and value > 0)
    ),
)


class LAMB(LayerwiseOptimizer):
    """Adam in which every layer moves by a share of its own weights.

    For each layer, with weights ``w``, gradient ``g`` and its step number ``t``::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat = m / (1 - beta1 ** t),  v_hat = v / (1 - beta2 ** t)
        u = m_hat / (sqrt(v_hat) + eps) + weight_decay * w
        trust_ratio = min(|w|, max_weight_norm) / (|u| + trust_eps)
        w = w - lr * trust_ratio * u

    You et al. 2019, Algorithm 2, with phi as ``min(|w|, max_weight_norm)``, which is ``|w|`` by default.
    Departure from the paper: where ``|w|`` or ``|u|`` is 0, the ratio is 1 before ``trust_clip``.

    As in the paper, a layer whose gradients are 0, and not None, shrinks by ``lr`` a step, however small
    ``weight_decay`` is above 0: ``decoupled_weight_decay=True`` makes that ``lr * weight_decay``. One that
    starts at 0 takes a first step of Adam at ``lr``, which ``trust_clip`` bounds.

    A group with ``layer_adaptation=False`` has ratio 1 throughout and is :class:`torch.optim.AdamW`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either as dicts.
        lr: Learning rate, at least 0; a number or a one-element tensor. The step of a layer relative to
            its weights.
        betas: Share of ``m`` and of ``v`` that is kept in a step, each in [0, 1).
        eps: Added to ``sqrt(v_hat)``, at least 0.
        weight_decay: Decay of the weights, at least 0.
        bias_correction: Whether ``m`` and ``v`` are corrected for their start at 0; without it
            ``m_hat = m`` and ``v_hat = v``.
        grad_averaging: Whether ``g`` enters ``m`` times ``1 - beta1``; without it, in full.
        decoupled_weight_decay: Whether ``w = (1 - lr * weight_decay) * w`` comes first, and no decay
            enters ``u``.
        trust_clip: A number above 0 caps the trust ratio; a pair ``(low, high)`` keeps it between the
            two; None leaves it.
        max_weight_norm: Bound, above 0, on the weight norm in the trust ratio (10 in some versions).
        trust_eps: Added to ``|u|``, at least 0.
        max_grad_norm: Bound, above 0, on the norm over all gradients of all groups. Gradients that are
            not finite do not count.
        maximize: Whether to climb instead of descend.
        fused: None takes fused kernels where they can do the step: Triton's on a GPU, for all options;
            torch's on the CPU, with ``bias_correction`` and ``grad_averaging``. Both work on
            float32 or half-precision layers without gaps in memory. True raises RuntimeError in
            :meth:`step` where they cannot, False takes none.

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

    RULES = SHARED | {
        "betas": BETAS,
        "eps": NON_NEGATIVE,
        "bias_correction": FLAG,
        "grad_averaging": FLAG,
        "trust_clip": CLIP,
        "max_weight_norm": NONE_OR_POSITIVE,
        "trust_eps": NON_NEGATIVE,
    }
    state_keys = frozenset({"step", "exp_avg", "exp_avg_sq"})

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
        super().__init__(params, self._defaults_from(locals()))

    def _direction(
        self, layers: Layers, weights: list[Tensor], grads: Tensors, lr: float | Tensor
    ) -> Tensors:
        group = layers.group
        weight_decay, (beta1, beta2) = group["weight_decay"], group["betas"]
        if group["decoupled_weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
            weight_decay = 0.0
        t, m, v = self._next_moments(layers)
        if layers.are_fused:
            u: Tensors = self._scratch.like(grads)
            eps = group["eps"]
            adam_direction(
                weights, grads, m, v, t, u, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay
            )
            return u
        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, grads, alpha=1 - beta1 if group["grad_averaging"] else 1.0)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)

        denominator = torch._foreach_sqrt(v)
        if group["bias_correction"]:
            correction1, correction2 = _corrections(t, group["betas"], accumulation_dtype(grads[0]))
            torch._foreach_div_(denominator, correction2.unbind())
        torch._foreach_add_(denominator, group["eps"])
        u = torch._foreach_div(m, denominator)
        if group["bias_correction"]:
            torch._foreach_div_(u, correction1.unbind())
        if weight_decay != 0:
            torch._foreach_add_(u, weights, alpha=weight_decay)
        return u

    def _trust_ratios(
        self, weight_norm: Number, direction_norm: Number, lr: float | Tensor, group: Mapping[str, Any]
    ) -> TrustRatios[Number]:
        numerator = weight_norm
        if group["max_weight_norm"] is not None:
            numerator = clip(weight_norm, 0.0, group["max_weight_norm"])
        ratio = unclipped = trust_ratio(numerator, direction_norm, eps=group["trust_eps"])
        if group["trust_clip"] is not None:
            trust_clip = group["trust_clip"]
            low, high = trust_clip if type(trust_clip) in (tuple, list) else (0.0, trust_clip)
            ratio = clip(unclipped, low, high)
        return TrustRatios(weight_norm, direction_norm, unclipped, ratio)

    def _decay_alone(self, group: Mapping[str, Any]) -> tuple[float, float]:
        # u = weight_decay * w
        weight_decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
        return (1 - ROUNDING) * weight_decay, (1 + ROUNDING) * weight_decay

    def _descend(
        self,
        layers: Layers,
        weights: list[Tensor],
        direction: Tensors,
        ratios: Tensor | None,
        lr: float | Tensor,
    ) -> None:
        if ratios is not None:
            torch._foreach_mul_(direction, ratios.unbind())
        subtract(weights, direction, lr)

    def _descend_on_cpu(
        self,
        layers: Layers,
        weights: list[Tensor],
        direction: Tensors,
        ratios: list[float] | None,
        lr: float,
    ) -> None:
        if ratios is None:
            subtract(weights, direction, lr)
        else:
            subtract_scaled(weights, direction, ratios, lr=lr)

    def _next_moments(self, layers: Layers) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the number of this step and the moments before it."""
        states = [self.state[p] for p in layers.params]
        for p, part, state in zip(layers.params, layers.parts, states, strict=True):
            if "exp_avg" not in state:
                dtype = torch.promote_types(part.dtype, torch.float32)
                state["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
                state["exp_avg"] = laid_out_as(p, torch.zeros_like(part, dtype=dtype))
                state["exp_avg_sq"] = laid_out_as(p, torch.zeros_like(part, dtype=dtype))
        t = [state["step"] for state in states]
        torch._foreach_add_(t, 1.0)
        m = [local(state["exp_avg"]) for state in states]
        return t, m, [local(state["exp_avg_sq"]) for state in states]

    def _advances_before_norms(self, group: Mapping[str, Any]) -> bool:
        return True

    def _why_no_cpu_kernel(self, group: Mapping[str, Any]) -> str | None:
        if not (group["bias_correction"] and group["grad_averaging"]):
            return "torch's kernel on the CPU needs bias_correction=True and grad_averaging=True"
        return None

    def _measure_in_triton(
        self, layers: Layers, gradient_scale: Tensor | None, lr: Tensor
    ) -> tuple[LayerTable, tuple[Tensor, Tensor] | None]:
        t, m, v = self._next_moments(layers)
        table = self._tables.table((layers.parts, layers.grads, m, v, t))
        if not layers.group["layer_adaptation"]:
            return table, None
        return table, self._in_triton("measure", layers, table, None, gradient_scale, lr)

    def _descend_in_triton(
        self,
        layers: Layers,
        table: LayerTable,
        ratios: Tensor | None,
        gradient_scale: Tensor | None,
        lr: Tensor,
    ) -> None:
        self._in_triton("descend", layers, table, ratios, gradient_scale, lr)

    def _in_triton(
        self,
        task: Literal["measure", "descend"],
        layers: Layers,
        table: LayerTable,
        ratios: Tensor | None,
        gradient_scale: Tensor | None,
        lr: Tensor,
    ) -> tuple[Tensor, Tensor] | None:
        from lightning_lars.optim.backends.triton_lamb import lamb

        group = layers.group
        beta1, beta2 = group["betas"]
        return lamb(
            table,
            layers.parts[0].dtype,
            advances=task == "measure" or ratios is None,
            measures=task == "measure",
            ratios=ratios,
            lr=lr,
            gradient_scale=gradient_scale,
            betas=(float(beta1), float(beta2)),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            bias_correction=group["bias_correction"],
            grad_averaging=group["grad_averaging"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            maximize=group["maximize"],
        )


def _corrections(
    t: Sequence[Tensor], betas: tuple[float, float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ``1 - beta1 ** t`` and ``sqrt(1 - beta2 ** t)`` of each layer."""
    steps = torch.stack(list(t)).to(dtype)
    return _one_minus_power(betas[0], steps), _one_minus_power(betas[1], steps).sqrt()


def _one_minus_power(beta: float, steps: Tensor) -> Tensor:
    # 1 - beta ** steps loses four digits of float32 where beta is near 1; this does not.
    return -torch.expm1(steps * _log(beta, steps))


def _log(beta: float, like: Tensor) -> float | Tensor:
    if torch.compiler.is_compiling():
        # A schedule may change it in every step: for the logarithm in Python there would be a graph each.
        return torch.full_like(like[0], beta - 1).log1p()
    return math.log(beta) if beta > 0 else -math.inf
