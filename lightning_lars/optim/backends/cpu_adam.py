"""A shortcut on the CPU for LAMB, by the fused kernel that torch has for Adam."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Hyperparameters
from lightning_lars.optim.backends.cpu_sgd import subtract_scaled
from lightning_lars.optim.backends.eager import Eager
from lightning_lars.optim.backends.tensor_list import TensorList

# Elements of a layer from which on one pass over it takes longer than to begin another.
_LONG = 16384


class CpuAdam(Eager):
    """The step of an algorithm whose direction is Adam's, with decay, and is what the trust ratio scales.

    ``m_hat / (sqrt(v_hat) + eps) + weight_decay * w`` is where ``weight_decay * w`` ends after a step of Adam
    with ``lr=-1``.
    """

    in_floats: ClassVar[bool] = True

    @staticmethod
    def why_not(h: Hyperparameters) -> str | None:
        """Return which hyperparameter it cannot do, None if it can do all."""
        if not (h.bias_correction and h.grad_averaging):
            return "torch's kernel on the CPU needs bias_correction=True and grad_averaging=True"
        return None

    def _direction_in_advance(self) -> TensorList:
        m, v = self.state.moments()
        assert m is not None
        assert v is not None
        beta1, beta2 = self.h.betas
        u = self._decay()
        torch._fused_adam_(
            u,
            self.g,
            m,
            v,
            [],
            self.state.next_steps(),
            lr=-1.0,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=self.h.eps,
            amsgrad=False,
            maximize=False,
        )
        return TensorList(u)

    def _decay(self) -> list[Tensor]:
        """Return ``weight_decay * w``."""
        decay, u = self.h.weight_decay, self.scratch.like(self.g)
        if decay == 0:  # 0 * w is not 0 where w is not finite
            torch._foreach_zero_(u)
        elif sum(map(Tensor.numel, self.w)) < _LONG * len(self.w):
            torch._foreach_copy_(u, self.w)
            torch._foreach_mul_(u, decay)
        else:
            for w, of_layer in zip(self.w, u, strict=True):
                torch.mul(w, decay, out=of_layer)
        return u

    def move(self, ratio: list[float] | None) -> None:
        """Move the weights by the ratios, 1 for None, when they have advanced the moments."""
        lr = float(self.lr)
        d = self._direction_in_advance() if self.stored_direction is None else self.stored_direction
        if ratio is None:
            torch._foreach_add_(self.w, list(d.value()), alpha=-lr)
        else:
            subtract_scaled(self.w, d.value(), [lr * of_layer for of_layer in ratio])
        self._write()
