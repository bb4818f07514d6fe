"""LARS and LAMB by the fused kernels that torch has for SGD and Adam on the CPU.

What they do in one pass over memory takes five to ten passes of single operations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]

SMALLEST_SCALE = 1e-8
"""Below, ``1 - (1 - scale)`` has lost more digits than float32 has."""


def can_fuse(*layers: Tensors) -> bool:
    """Tell whether torch's kernels can work on these lists of tensors, which correspond to each other."""
    if torch.compiler.is_compiling():
        return False
    # The kernels go through memory without regard to strides. float64 is for those who want every digit.
    return all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
        for tensors in layers
        for tensor in tensors
    )


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

    This is SGD whose ``dampening`` is ``1 - scale``.
    """
    for layer, g, of_layer, scale in zip(weights, grads, v, scales, strict=True):
        torch._fused_sgd_(
            [layer],
            [g],
            [of_layer],
            weight_decay=weight_decay,
            momentum=momentum,
            lr=lr,
            dampening=1 - scale,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )


def adam_direction(
    grads: Tensors, m: Tensors, v: Tensors, steps: Tensors, *, betas: tuple[float, float], eps: float
) -> list[Tensor]:
    """Advance ``m`` and ``v`` in place and return ``m_hat / (sqrt(v_hat) + eps)``.

    This is where weights that are zero end, after a step of Adam with ``lr=-1``.

    Args:
        grads: ``g`` of each layer.
        m: First moment of each layer.
        v: Second moment of each layer.
        steps: 0-d, the number of this step for each layer, from 1.
        betas: Decay of ``m`` and ``v``.
        eps: Added to the denominator.
    """
    u = [torch.zeros_like(g) for g in grads]
    beta1, beta2 = betas
    torch._fused_adam_(
        u,
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
    return u
