"""A shortcut on the CPU for algorithms whose direction is SGD's, by the fused kernel that torch has for it.

What the kernel does in one pass over memory takes five to ten passes of foreach operations.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Hyperparameters
from lightning_lars.optim.backends.eager import Eager
from lightning_lars.optim.backends.tensor_list import TensorList

# Below, 1 - (1 - scale) has lost more digits than float32 has.
_MIN_SCALE = 1e-8

# Share of the weights that decays in a step, up to which g + weight_decay * w can be told after it.
_MAX_DECAY = 0.5


class CpuSGD(Eager):
    """The step of an algorithm whose direction is SGD's.

    Its factors are ``rate, scale, input_scale``, and its direction is::

        u = scale * (g + weight_decay * w)
        v = momentum * v + input_scale * u
        d = u + momentum * v  if nesterov else  v
    """

    in_floats: ClassVar[bool] = True

    @staticmethod
    def why_not(h: Hyperparameters) -> str | None:
        """Return which hyperparameter it cannot do, None if it can do all."""
        if h.layer_adaptation and h.nesterov and h.denominator == "momentum":
            return 'torch has no kernel on the CPU that does nesterov with denominator="momentum"'
        return None

    def _direction_in_advance(self) -> TensorList:
        (v,) = self.state.moments()
        if v is None:
            return super()._direction_in_advance()
        _, _, input_scale = self._factors(1.0)
        _sgd(self.w, self.g, v, self.h, lr=0.0, input_scale=input_scale)  # which only advances v
        return TensorList(v)

    def move(self, ratio: list[float] | None) -> None:
        """Move the weights, and what :meth:`measure` has not moved, by the trust ratios, 1 for None."""
        self.lr = float(self.lr)
        if self.stored_direction is not None:
            assert ratio is not None
            subtract_scaled(
                self.w, self.stored_direction.value(), [self._factors(of_layer)[0] for of_layer in ratio]
            )
            self._write()
            return
        h, (v,) = self.h, self.state.moments()
        lr, is_first, factors_of = self.lr, self.batch.is_first, self.algorithm.factors
        factors = [factors_of(each, lr, is_first, 0, h) for each in ([1.0] if ratio is None else ratio)]
        if ratio is None and factors[0][1] == 1:
            rate, _, input_scale = factors[0]
            _sgd(self.w, self.g, v, h, lr=rate, input_scale=input_scale, nesterov=h.nesterov)
        elif all([_is_precise(h, *of_layer) for of_layer in factors]):  # noqa: C419, as it is faster
            for i, (w, g) in enumerate(zip(self.w, self.g, strict=True)):
                of_layer = factors[0] if ratio is None else factors[i]
                adapted_sgd(h, w, g, None if v is None else v[i], *of_layer)
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
        h: Hyperparameters.
        w: Weights.
        g: Gradient, only read.
        v: Momentum; None without, and then ``w = w - rate * scale * u``.
        rate: Factor on the direction.
        scale: The trust ratio, which scales the gradient.
        input_scale: Factor on what enters ``v``.
    """
    if h.nesterov or v is None:
        _sgd([w], [g], None, h, lr=rate * scale)
    if h.nesterov:
        rate, scale = rate * h.momentum, scale / (1 - rate * scale * h.weight_decay)
    if v is not None:
        _sgd([w], [g], [v], h, lr=rate, input_scale=scale * input_scale)


def _is_precise(h: Hyperparameters, rate: float, scale: float, input_scale: float) -> bool:
    """Tell whether :func:`adapted_sgd` has the digits for these factors."""
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


def subtract_scaled(weights: Sequence[Tensor], d: Sequence[Tensor], rates: Sequence[float]) -> None:
    """Apply ``w = w - rate * d`` in place, in one pass over each layer."""
    for w, of_layer, rate in zip(weights, d, rates, strict=True):
        w.add_(of_layer, alpha=-rate)
