"""LARS and LAMB by the fused kernels that torch has for SGD and Adam on the CPU.

What they do in one pass over memory takes five to ten passes of single operations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]

# Below, 1 - (1 - scale) has lost more digits than float32 has.
_SMALLEST_SCALE = 1e-8

# Share of the weights that decays in a step, up to which g + weight_decay * w can be told after it.
_MOST_DECAY = 0.5

# Elements of a layer from which on one pass over it takes longer than to begin another.
_LONG = 16384


def can_adapt(
    scales: Sequence[float], entering: Sequence[float], *, lr: float, weight_decay: float, nesterov: bool
) -> bool:
    """Tell whether :func:`adapted_sgd` has the digits for these factors."""
    if not all(factor > _SMALLEST_SCALE for factor in entering):
        return False
    return not nesterov or all(lr * scale * weight_decay < _MOST_DECAY for scale in scales)


def adapted_sgd(
    weights: Tensors,
    grads: Tensors,
    v: Tensors,
    scales: Sequence[float],
    entering: Sequence[float],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """Take the step of LARS in place, layer by layer.

    ::

        u = g + weight_decay * w
        v = momentum * v + entering * u
        w = w - lr * (scale * u + momentum * v  if nesterov else  v)

    This is SGD whose ``dampening`` is ``1 - entering``. SGD's own Nesterov is undampened, so the step is made
    of two: ``w = w - lr * scale * u``, after which ``g + weight_decay * w`` is
    ``(1 - lr * scale * weight_decay) * u``, and ``w = w - lr * momentum * v``.

    Args:
        weights: ``w`` of each layer.
        grads: ``g`` of each layer, only read.
        v: Momentum of each layer; empty without, and then ``w = w - lr * scale * u``.
        scales: The trust ratio of each layer.
        entering: Factor of each layer on what enters ``v``: the ratio, dampened.
        lr: Learning rate.
        momentum: Share of ``v`` that is kept.
        weight_decay: Decay of the weights.
        nesterov: Whether to look ahead.
    """
    for i, (w, g, scale, factor) in enumerate(zip(weights, grads, scales, entering, strict=True)):
        rate = lr
        if nesterov or not momentum:
            sgd([w], [g], [], lr=lr * scale, momentum=0.0, weight_decay=weight_decay)
        if nesterov:
            rate, factor = lr * momentum, factor / (1 - lr * scale * weight_decay)
        if momentum:
            sgd(
                [w],
                [g],
                [v[i]],
                lr=rate,
                momentum=momentum,
                weight_decay=weight_decay,
                dampening=1 - factor,
            )


def sgd(
    weights: Tensors,
    u: Tensors,
    v: Tensors,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> None:
    """Apply SGD in place, with ``u`` for the gradients.

    ::

        u = u + weight_decay * w
        v = momentum * v + (1 - dampening) * u
        w = w - lr * (u + momentum * v  if nesterov else  v)
    """
    torch._fused_sgd_(
        list(weights),
        list(u),
        list(v),
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=dampening,
        nesterov=nesterov,
        maximize=False,
        is_first_step=False,
    )


def adam_direction(
    weights: Tensors,
    grads: Tensors,
    m: Tensors,
    v: Tensors,
    steps: Tensors,
    u: Tensors,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Advance ``m`` and ``v`` in place and write ``u = m_hat / (sqrt(v_hat) + eps) + weight_decay * w``.

    This is where ``weight_decay * w`` ends after a step of Adam with ``lr=-1``.

    Args:
        weights: ``w`` of each layer, only read.
        grads: ``g`` of each layer.
        m: First moment of each layer.
        v: Second moment of each layer.
        steps: 0-d, the number of this step for each layer, from 1.
        u: Where the direction of each layer is written.
        betas: Decay of ``m`` and ``v``.
        eps: Added to the denominator.
        weight_decay: Decay of the weights.
    """
    if weight_decay == 0:  # 0 * w is not 0 where w is not finite
        torch._foreach_zero_(list(u))
    elif sum(map(Tensor.numel, weights)) < _LONG * len(weights):
        torch._foreach_copy_(list(u), list(weights))
        torch._foreach_mul_(list(u), weight_decay)
    else:
        for w, of_layer in zip(weights, u, strict=True):
            torch.mul(w, weight_decay, out=of_layer)
    beta1, beta2 = betas
    torch._fused_adam_(
        list(u),
        list(grads),
        list(m),
        list(v),
        [],
        list(steps),
        lr=-1.0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def subtract_scaled(weights: Tensors, u: Tensors, scales: Sequence[float], *, lr: float) -> None:
    """Apply ``w = w - lr * scale * u`` in place, in one pass over each layer."""
    for w, of_layer, scale in zip(weights, u, scales, strict=True):
        w.add_(of_layer, alpha=-lr * scale)
