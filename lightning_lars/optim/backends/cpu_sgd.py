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
    """The step of :class:`~lightning_lars.optim.lars.LARS`."""

    def _direction_in_advance(self) -> TensorList:
        (v,) = self.state.moments()
        if v is None or self.h.nesterov:  # the kernel has no output for a direction that is not v
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
            self._write()
            return
        halves = [split for each in factors if (split := halves_of_step(h, *each)) is not None]
        if len(halves) < len(factors):
            super().move(1.0 if ratio is None else self.w[0].new_tensor(ratio))
            return
        for i, (w, g) in enumerate(zip(self.w, self.g, strict=True)):
            take_halves(h, w, g, None if v is None else v[i], halves[0 if ratio is None else i])
        self._write()


def halves_of_step(
    h: Hyperparameters, rate: float, scale: float, input_scale: float
) -> tuple[float | None, float, float] | None:
    """Split the step of an adapted layer into a step of SGD without momentum and one with it.

    Without Nesterov momentum, the second is the whole step. Nesterov momentum as SGD has it is undampened:
    here its first half is ``w = w - rate * scale * u``, which also takes ``rate * scale * weight_decay * u``
    from ``u``, and its second half ``w = w - rate * momentum * v``.

    Args:
        h: The hyperparameters of the group.
        rate: Factor on the direction.
        scale: Factor on the gradient: the trust ratio.
        input_scale: Factor on ``u`` in the update of ``v``: one minus the dampening.

    Returns:
        The learning rate of the first half, None if there is none, and that of the second half with its
        ``input_scale``. None if the two halves are not exact to float32 precision.
    """
    if not scale * input_scale > _MIN_SCALE:
        return None
    if not h.momentum:
        return None, rate * scale, input_scale
    if not h.nesterov:
        return None, rate, scale * input_scale
    decay = rate * scale * h.weight_decay
    if not decay < _MAX_DECAY:
        return None
    return rate * scale, rate * h.momentum, scale / (1 - decay) * input_scale


def take_halves(
    h: Hyperparameters,
    w: Tensor,
    g: Tensor,
    v: Tensor | None,
    halves: tuple[float | None, float, float],
) -> None:
    """Take the step of one layer in place, as :func:`halves_of_step` splits it; ``g`` is only read."""
    first, second, input_scale = halves
    if first is not None:
        _sgd([w], [g], None, h, lr=first)
    _sgd([w], [g], None if v is None else [v], h, lr=second, input_scale=input_scale)


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
