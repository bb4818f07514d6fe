"""A back end for LAMB on the CPU, built on torch's fused AdamW kernel."""

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Algorithm, Hyperparameters
from lightning_lars.optim.backends.cpu import Cpu, subtract_scaled
from lightning_lars.optim.backends.tensor_list import TensorList

# Layers of this many elements or more, on average, are multiplied one by one: a single pass over memory then
# costs less than the two of foreach operations.
_LONG = 16384


class CpuAdam(Cpu):
    """The step of :class:`~lightning_lars.optim.lamb.LAMB`.

    Its direction is the result of a step of Adam with ``lr=-1`` that starts at ``weight_decay * w``. Without
    ``layer_adaptation`` the step is AdamW's own.
    """

    @staticmethod
    def why_not(algorithm: type[Algorithm], h: Hyperparameters) -> str | None:
        """Return which hyperparameters the kernel does not support, None if it supports all."""
        if not (h.bias_correction and h.grad_averaging):
            return "torch's kernel on the CPU needs bias_correction=True and grad_averaging=True"
        return None

    def _direction_in_advance(self) -> TensorList:
        u = self._decay_term()
        self._adamw(u, -1.0, 0.0)
        return TensorList(u)

    def _decay_term(self) -> list[Tensor]:
        """Return what the decay adds to the direction."""
        decay, u = self.h.weight_decay, self.scratch.like(self.g)
        if decay == 0:  # 0 * w is not 0 where w is not finite
            torch._foreach_zero_(u)
        elif sum(map(Tensor.numel, self.w)) < _LONG * len(self.w):
            torch._foreach_copy_(u, self.w)
            torch._foreach_mul_(u, decay)
        else:
            for w, decayed in zip(self.w, u, strict=True):
                torch.mul(w, decay, out=decayed)
        return u

    def move(self, ratio: list[float] | None) -> None:
        """Update the weights with the trust ratios, and the moments too if ``ratio`` is None."""
        lr = float(self.lr)
        if self.stored_direction is None:
            self._adamw(self.w, lr, self.h.weight_decay)
        else:
            assert ratio is not None
            subtract_scaled(self.w, self.stored_direction.value(), [lr * each for each in ratio])
        self._write()

    def _adamw(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        m, v = filter(None, self.state.moments())  # both are always in use
        beta1, beta2 = self.h.betas
        torch._fused_adamw_(
            params,
            self.g,
            m,
            v,
            [],
            self.state.next_steps(),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=self.h.eps,
            amsgrad=False,
            maximize=False,
        )
