"""A back end for LARS on the CPU, built on torch's fused SGD kernel.

The kernel makes one pass over memory, where foreach operations make five to ten.
"""

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Hyperparameters
from lightning_lars.optim.backends.cpu import Cpu, subtract_scaled
from lightning_lars.optim.backends.tensor_list import TensorList

# The smallest scale whose dampening, 1 - scale, keeps it to float32 precision.
_MIN_SCALE = 1e-8

# The largest decay of the weights in a step after which g + weight_decay * w can still be recovered.
_MAX_DECAY = 0.5


class CpuSGD(Cpu):
    """The step of an algorithm with the direction of SGD.

    The factors are ``rate, scale, input_scale``, and the direction is::

        u = scale * (g + weight_decay * w)
        v = momentum * v + input_scale * u
        d = u + momentum * v  if nesterov else  v
    """

    @staticmethod
    def why_not(h: Hyperparameters) -> str | None:
        """Return which hyperparameters the kernel does not support, None if it supports all."""
        if h.layer_adaptation and h.nesterov and h.denominator == "momentum":
            return 'torch has no fused CPU kernel for nesterov with denominator="momentum"'
        return None

    def _direction_in_advance(self) -> TensorList:
        (v,) = self.state.moments()
        if v is None:
            return super()._direction_in_advance()
        _, _, input_scale = self._factors(1.0)
        _sgd(self.w, self.g, v, self.h, lr=0.0, input_scale=input_scale)  # only updates v
        return TensorList(v)

    def move(self, ratio: list[float] | None) -> None:
        """Update the weights, and the moments unless :meth:`measure` has; a ratio of None is 1."""
        self.lr = float(self.lr)
        if self.stored_direction is not None:
            assert ratio is not None
            subtract_scaled(self.w, self.stored_direction.value(), [self._factors(each)[0] for each in ratio])
            self._write()
            return
        h, (v,) = self.h, self.state.moments()
        lr, is_first, factors_of = self.lr, self.batch.is_first, self.algorithm.factors
        factors = [factors_of(each, lr, is_first, 0, h) for each in ([1.0] if ratio is None else ratio)]
        if ratio is None and factors[0][1] == 1:
            rate, _, input_scale = factors[0]
            _sgd(self.w, self.g, v, h, lr=rate, input_scale=input_scale, nesterov=h.nesterov)
        elif all([_is_precise(h, *each) for each in factors]):  # noqa: C419, because it is faster
            for i, (w, g) in enumerate(zip(self.w, self.g, strict=True)):
                own = factors[0] if ratio is None else factors[i]
                adapted_sgd(h, w, g, None if v is None else v[i], *own)
        else:
            super().move(1.0 if ratio is None else self.w[0].new_tensor(ratio))
            return
        self._write()


def adapted_sgd(
    h: Hyperparameters, w: Tensor, g: Tensor, v: Tensor | None, rate: float, scale: float, input_scale: float
) -> None:
    """Take the step of one layer in place.

    This is SGD with ``dampening=1 - scale * input_scale``. SGD's own Nesterov momentum is undampened, so it
    takes two steps: ``w = w - rate * scale * u``, after which ``g + weight_decay * w`` is
    ``(1 - rate * scale * weight_decay) * u``, and ``w = w - rate * momentum * v``.

    Args:
        h: The hyperparameters of the group.
        w: Weights.
        g: Gradient, only read.
        v: Momentum buffer; None without momentum, and then ``w = w - rate * scale * u``.
        rate: Factor on the direction.
        scale: Factor on the gradient: the trust ratio.
        input_scale: Factor on ``u`` in the update of ``v``: one minus the dampening.
    """
    if h.nesterov or v is None:
        _sgd([w], [g], None, h, lr=rate * scale)
    if h.nesterov:
        rate, scale = rate * h.momentum, scale / (1 - rate * scale * h.weight_decay)
    if v is not None:
        _sgd([w], [g], [v], h, lr=rate, input_scale=scale * input_scale)


def _is_precise(h: Hyperparameters, rate: float, scale: float, input_scale: float) -> bool:
    """Return whether :func:`adapted_sgd` is exact to float32 precision with these factors."""
    return scale * input_scale > _MIN_SCALE and not (
        h.nesterov and not rate * scale * h.weight_decay < _MAX_DECAY
    )


def _sgd(
    weights: list[Tensor],
    grads: list[Tensor],
    v: list[Tensor] | None,
    h: Hyperparameters,
    *,
    lr: float,
    input_scale: float = 1.0,
    nesterov: bool = False,
) -> None:
    torch._fused_sgd_(
        weights,
        grads,
        v or [],
        weight_decay=h.weight_decay,
        momentum=0.0 if v is None else h.momentum,
        lr=lr,
        dampening=1 - input_scale,
        nesterov=nesterov,
        maximize=False,
        is_first_step=False,
    )
