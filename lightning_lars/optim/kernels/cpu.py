"""LARS and LAMB by the fused kernels that torch has for SGD and Adam on the CPU.

What they do in one pass over memory takes five to ten passes of single operations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]

SMALLEST_SCALE = 1e-8
"""Below, ``1 - (1 - scale)`` has lost more digits than float32 has."""


SMALL = 4096
"""Elements of a layer below which the call of a kernel takes longer than its work."""


def are_small(layers: Tensors) -> bool:
    """Tell whether the layers are so small that they had better share a call."""
    return sum(layer.numel() for layer in layers) < SMALL * len(layers)


def adapted_sgd(
    weights: Tensors,
    grads: Tensors,
    v: Tensors,
    scales: Sequence[float],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Apply ``v = momentum * v + scale * (g + weight_decay * w); w = w - lr * v`` in place, layer by layer.

    This is SGD whose ``dampening`` is ``1 - scale``, and without momentum, whose learning rate is
    ``lr * scale``.
    """
    for i, (layer, g, scale) in enumerate(zip(weights, grads, scales, strict=True)):
        torch._fused_sgd_(
            [layer],
            [g],
            [v[i]] if momentum else [],
            weight_decay=weight_decay,
            momentum=momentum,
            lr=lr if momentum else lr * scale,
            dampening=1 - scale if momentum else 0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )


def sgd(
    weights: Tensors,
    u: Tensors,
    v: Tensors,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
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
