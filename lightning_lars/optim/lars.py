"""LARS: layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, arXiv:1708.03888)."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lars.optim.backends.cpu import adapted_sgd, can_adapt, sgd, subtract_scaled
from lightning_lars.optim.backends.triton_table import LayerTable
from lightning_lars.optim.layers import Layers
from lightning_lars.optim.layerwise import SHARED, LayerwiseOptimizer, subtract
from lightning_lars.optim.trust_ratio import ROUNDING, Number, TrustRatios, clip, over_lr, trust_ratio
from lightning_lars.rules import (
    FLAG,
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    Rule,
    is_number,
    one_of,
    require,
)
from lightning_lars.sharding.norms import Tensors
from lightning_lars.sharding.shards import laid_out_as, local

CLIP = Rule(
    'None, "larc" or a number above 0',
    lambda value: value > 0 if is_number(value) else value in (None, "larc"),
)


class LARS(LayerwiseOptimizer):
    """SGD with momentum in which every layer has a learning rate of its own.

    For each layer, with weights ``w`` and gradient ``g``::

        trust_ratio = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)
        u = trust_ratio * (g + weight_decay * w)
        v = momentum * v + (1 - dampening) * u
        w = w - lr * (u + momentum * v  if nesterov else  v)

    You et al. 2017, Algorithm 1, with eta for ``trust_coefficient``, beta for ``weight_decay`` and
    lambda for the trust ratio. Departures from the paper:

    - ``lr`` multiplies ``v`` when it is applied, as in :class:`torch.optim.SGD`, not inside ``v``. The two
      differ while ``lr`` changes; ``lr_in_momentum=True`` gives the paper's form.
    - The first ``v`` is ``u`` without dampening, as in :class:`torch.optim.SGD`.
    - Where ``|w|`` or the denominator without ``eps`` is 0, the ratio is 1 before ``trust_clip``.

    As in the paper, a layer whose gradient is 0, and not None, shrinks by ``trust_coefficient * lr`` a step,
    however small ``weight_decay`` is above 0: ``decoupled_weight_decay=True`` makes that
    ``lr * weight_decay``. One that starts at 0 takes a first step of SGD at ``lr``, which ``trust_clip``
    bounds.

    A group with ``layer_adaptation=False`` has ratio 1 throughout and is :class:`torch.optim.SGD`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either as dicts.
        lr: Learning rate, at least 0; a number or a one-element tensor. With the default
            ``trust_coefficient``, good values are about a thousand times those of ``torch.optim.SGD``.
        momentum: Share of ``v`` that is kept in a step, in [0, 1).
        weight_decay: L2 penalty, at least 0.
        dampening: Share of ``u`` that is kept out of ``v``, in [0, 1).
        nesterov: Whether to look ahead along ``v``; needs momentum.
        trust_coefficient: The ratio of a layer's step to its weights at ``lr=1``, above 0.
        eps: Added to the denominator, at least 0.
        denominator: What ``|w|`` is divided by. ``"gradient"``: as above. ``"decayed_gradient"``:
            ``|g + weight_decay * w| + eps`` (SimCLR, BYOL, Barlow Twins, optax). ``"momentum"``: momentum
            runs first, on ``g + weight_decay * w``; its direction ``d``, Nesterov's included, is then
            applied as ``w = w - lr * trust_coefficient * |w| / (|d| + eps) * d``.
        trust_clip: A number above 0 caps the trust ratio. ``"larc"`` makes it
            ``min(trust_ratio / lr, 1)``, so that no layer moves faster than ``lr``. None: no clip.
        lr_in_momentum: Whether ``v = momentum * v + (1 - dampening) * lr * u`` and ``w = w - v``.
        decoupled_weight_decay: Whether ``w = (1 - lr * weight_decay) * w`` comes first, and no decay
            enters ``g`` or the trust ratio.
        max_grad_norm: Bound, above 0, on the norm over all gradients of all groups. Gradients that are
            not finite do not count.
        maximize: Whether to climb instead of descend.
        fused: None takes fused kernels where they can do the step: Triton's on a GPU, for all options;
            torch's on the CPU, except for ``nesterov`` with ``denominator="momentum"``. Both work on
            float32 or half-precision layers without gaps in memory. True raises RuntimeError in
            :meth:`step` where they cannot, False takes none.

    Raises:
        ValueError: If an argument, here or in a group, breaks its rule.

    Example:
        >>> import torch
        >>> from lightning_lars import LARS
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LARS([("w", w)], lr=1.0, trust_coefficient=0.1)
        >>> for _ in range(2):
        ...     w.grad = torch.tensor([0.0, 1000.0])  # of any scale: the step is 0.1 * |w|
        ...     optimizer.step()
        ...     print(w.data, optimizer.trust_ratios()["w"])
        tensor([3.0000, 3.5000]) tensor(0.0005)
        tensor([3.0000, 2.5890]) tensor(0.0005)
    """

    RULES = SHARED | {
        "momentum": FRACTION,
        "dampening": FRACTION,
        "nesterov": FLAG,
        "trust_coefficient": POSITIVE,
        "eps": NON_NEGATIVE,
        "denominator": one_of("gradient", "decayed_gradient", "momentum"),
        "trust_clip": CLIP,
        "lr_in_momentum": FLAG,
    }
    state_keys = frozenset({"momentum_buffer"})

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
        super().__init__(params, self._defaults_from(locals()))

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        if group["momentum"] == 0:
            for name, absent in (("nesterov", False), ("lr_in_momentum", False), ("dampening", 0)):
                rule = f"{absent} without momentum (set momentum above 0)"
                require(name, rule, group[name], group[name] == absent)
        if group["denominator"] == "momentum":
            rule = 'False with denominator="momentum", where lr would cancel out of the step'
            require("lr_in_momentum", rule, group["lr_in_momentum"], not group["lr_in_momentum"])

    def _direction(
        self, layers: Layers, weights: list[Tensor], grads: Tensors, lr: float | Tensor
    ) -> Tensors:
        group = layers.group
        if group["decoupled_weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        if group["denominator"] == "gradient" or not group["layer_adaptation"]:
            return grads
        if layers.are_fused and _momentum_is_first(group):
            self._descend_by_sgd(layers, weights, grads, 0.0, _decay(group))
            return self._buffers(layers)
        u = _decayed(grads, weights, group)
        return self._momentum(layers.params, u, group) if group["denominator"] == "momentum" else u

    def _trust_ratios(
        self, weight_norm: Number, direction_norm: Number, lr: float | Tensor, group: Mapping[str, Any]
    ) -> TrustRatios[Number]:
        denominator = direction_norm
        if group["denominator"] == "gradient":
            denominator = direction_norm + _decay(group) * weight_norm
        ratio = unclipped = trust_ratio(
            weight_norm, denominator, trust_coefficient=group["trust_coefficient"], eps=group["eps"]
        )
        if group["trust_clip"] == "larc":
            unclipped = over_lr(unclipped, lr)
            ratio = clip(unclipped, 0.0, 1.0)
        elif group["trust_clip"] is not None:
            ratio = clip(unclipped, 0.0, group["trust_clip"])
        return TrustRatios(weight_norm, denominator, unclipped, ratio)

    def _decay_alone(self, group: Mapping[str, Any]) -> tuple[float, float]:
        weight_decay = _decay(group)
        if group["denominator"] != "momentum" or not group["momentum"]:
            return (1 - ROUNDING) * weight_decay, (1 + ROUNDING) * weight_decay
        # v' grows from weight_decay * w to this, and a little more as w shrinks.
        steady = weight_decay * (1 - group["dampening"]) / (1 - group["momentum"])
        return 0.0, 1.25 * steady

    def _descend(
        self,
        layers: Layers,
        weights: list[Tensor],
        direction: Tensors,
        ratios: Tensor | None,
        lr: float | Tensor,
    ) -> None:
        u, group = direction, layers.group
        if ratios is not None and group["denominator"] == "momentum":
            subtract(weights, torch._foreach_mul(u, ratios.unbind()), lr)
            return
        weight_decay = _decay_after_norms(group, ratios is not None)
        if weight_decay != 0:
            u = torch._foreach_add(u, weights, alpha=weight_decay)
        if ratios is not None:
            u = torch._foreach_mul(u, ratios.unbind())
        if group["lr_in_momentum"]:
            u, lr = torch._foreach_mul(u, lr), 1.0
        subtract(weights, self._momentum(layers.params, u, group), lr)

    def _descend_on_cpu(
        self,
        layers: Layers,
        weights: list[Tensor],
        direction: Tensors,
        ratios: list[float] | None,
        lr: float,
    ) -> None:
        group = layers.group
        if ratios is not None and group["denominator"] == "momentum":
            subtract_scaled(weights, direction, ratios, lr=lr)
            return
        weight_decay = _decay_after_norms(group, ratios is not None)
        if ratios is None and not group["lr_in_momentum"]:
            self._descend_by_sgd(layers, weights, direction, lr, weight_decay)
        elif not self._descend_by_adapted_sgd(layers, weights, direction, ratios, lr, weight_decay):
            of_layers = None if ratios is None else weights[0].new_tensor(ratios)
            self._descend(layers, weights, direction, of_layers, lr)

    def _descend_by_adapted_sgd(
        self,
        layers: Layers,
        weights: list[Tensor],
        u: Tensors,
        ratios: list[float] | None,
        lr: float,
        weight_decay: float,
    ) -> bool:
        """Move the weights by a kernel for each layer, if it has the digits; return whether it has."""
        group = layers.group
        scales = [1.0] * len(layers.params) if ratios is None else ratios
        if group["lr_in_momentum"]:
            scales, lr = [scale * lr for scale in scales], 1.0
        entering = scales
        if group["dampening"]:  # but at the first step v = u
            share = 1 - group["dampening"]
            entering = [
                share * scale if self._has_begun(p) else scale
                for p, scale in zip(layers.params, scales, strict=True)
            ]
        nesterov = group["nesterov"]
        if not can_adapt(scales, entering, lr=lr, weight_decay=weight_decay, nesterov=nesterov):
            return False
        momentum = group["momentum"]
        v = self._buffers(layers) if momentum else []
        adapted_sgd(
            weights,
            u,
            v,
            scales,
            entering,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )
        return True

    def _descend_by_sgd(
        self, layers: Layers, weights: list[Tensor], u: Tensors, lr: float, weight_decay: float
    ) -> None:
        """Advance ``v`` and move the weights by one kernel for all layers."""
        group = layers.group
        dampened: list[int] = []
        undampened: list[int] = []
        for i, p in enumerate(layers.params):
            (dampened if self._has_begun(p) else undampened).append(i)
        v = self._buffers(layers) if group["momentum"] else []
        for indices, dampening in ((dampened, group["dampening"]), (undampened, 0.0)):
            if indices:
                sgd(
                    [weights[i] for i in indices],
                    [u[i] for i in indices],
                    [v[i] for i in indices] if v else [],
                    lr=lr,
                    momentum=group["momentum"],
                    weight_decay=weight_decay,
                    dampening=dampening,
                    nesterov=group["nesterov"],
                )

    def _has_momentum(self, p: Tensor) -> bool:
        return self.state[p].get("momentum_buffer") is not None

    def _has_begun(self, p: Tensor) -> bool:
        """Tell whether this is not the first step of the layer, in which ``v = u``."""
        return self._has_momentum(p) and p not in self._only_tried

    def _buffers(self, layers: Layers) -> list[Tensor]:
        """Return ``v`` of each layer, 0 where there is none yet."""
        for p, part in zip(layers.params, layers.parts, strict=True):
            if not self._has_momentum(p):
                self.state[p]["momentum_buffer"] = laid_out_as(p, torch.zeros_like(part, dtype=torch.float32))
        return [local(self.state[p]["momentum_buffer"]) for p in layers.params]

    def _advances_before_norms(self, group: Mapping[str, Any]) -> bool:
        return bool(group["layer_adaptation"]) and _momentum_is_first(group)

    def _why_no_cpu_kernel(self, group: Mapping[str, Any]) -> str | None:
        if group["denominator"] == "momentum" and group["nesterov"] and group["layer_adaptation"]:
            return 'torch has no kernel on the CPU that does nesterov with denominator="momentum"'
        return None

    def _measure_in_triton(
        self, layers: Layers, gradient_scale: Tensor | None, lr: Tensor
    ) -> tuple[LayerTable, tuple[Tensor, Tensor] | None]:
        from lightning_lars.optim.backends import triton_lars

        group = layers.group
        are_first = [int(not self._has_begun(p)) for p in layers.params]
        v = self._buffers(layers) if group["momentum"] else layers.parts
        table = self._tables.table((layers.parts, layers.grads, v), (are_first,))
        if not group["layer_adaptation"]:
            return table, None
        denominator = group["denominator"]
        if denominator == "momentum" and not _momentum_is_first(group):
            denominator = "decayed_gradient"
        norms = triton_lars.measure(
            table,
            layers.parts[0].dtype,
            lr=lr,
            gradient_scale=gradient_scale,
            denominator=denominator,
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=group["nesterov"],
            weight_decay=float(group["weight_decay"]),
            decoupled_weight_decay=group["decoupled_weight_decay"],
            maximize=group["maximize"],
        )
        return table, norms

    def _descend_in_triton(
        self,
        layers: Layers,
        table: LayerTable,
        ratios: Tensor | None,
        gradient_scale: Tensor | None,
        lr: Tensor,
    ) -> None:
        from lightning_lars.optim.backends import triton_lars

        group = layers.group
        triton_lars.descend(
            table,
            layers.parts[0].dtype,
            ratios,
            lr=lr,
            gradient_scale=gradient_scale,
            has_moved=ratios is not None and _momentum_is_first(group),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=group["nesterov"],
            lr_in_momentum=group["lr_in_momentum"],
            weight_decay=float(group["weight_decay"]),
            decoupled_weight_decay=group["decoupled_weight_decay"],
            maximize=group["maximize"],
        )

    def _momentum(self, params: list[Tensor], u: Tensors, group: Mapping[str, Any]) -> Tensors:
        """Advance ``v`` and return the direction: ``u + momentum * v`` if nesterov else ``v``."""
        momentum = group["momentum"]
        if momentum == 0:
            return u
        states = [self.state[p] for p in params]
        going = [i for i, p in enumerate(params) if self._has_begun(p)]
        if going:
            v = [local(states[i]["momentum_buffer"]) for i in going]
            torch._foreach_mul_(v, momentum)
            torch._foreach_add_(v, [u[i] for i in going], alpha=1 - group["dampening"])
        for p, state, first in zip(params, states, u, strict=True):
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = laid_out_as(p, first.clone())
            elif p in self._only_tried:
                local(state["momentum_buffer"]).mul_(momentum).add_(first)
        v = [local(state["momentum_buffer"]) for state in states]
        return torch._foreach_add(u, v, alpha=momentum) if group["nesterov"] else v


def _momentum_is_first(group: Mapping[str, Any]) -> bool:
    """Tell whether ``v`` is advanced before the ratio is known."""
    return bool(group["momentum"]) and group["denominator"] == "momentum"


def _decay(group: Mapping[str, Any]) -> float:
    """Return the weight decay that enters the gradient."""
    return 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]


def _decay_after_norms(group: Mapping[str, Any], is_adapted: bool) -> float:
    """Return the weight decay that is not in the direction yet."""
    return _decay(group) if group["denominator"] == "gradient" or not is_adapted else 0.0


def _decayed(grads: Tensors, weights: list[Tensor], group: Mapping[str, Any]) -> Tensors:
    """Return ``g + weight_decay * w``, the gradients themselves without decay."""
    weight_decay = _decay(group)
    return grads if weight_decay == 0 else torch._foreach_add(grads, weights, alpha=weight_decay)
