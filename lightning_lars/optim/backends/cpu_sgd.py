"""A back end on the CPU for algorithms that scale the gradients of SGD, built on torch's fused kernel.

The kernel makes one pass over memory, where foreach operations make five to ten.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Algorithm, Hyperparameters
from lightning_lars.optim.backends.cpu import Cpu, subtract_scaled
from lightning_lars.optim.backends.tensor_list import TensorList
from lightning_lars.optim.batches import Batch

# The smallest scale whose dampening, 1 - scale, keeps it to float32 precision.
_MIN_SCALE = 1e-8

# The largest decay of the weights in a step after which g + decay * w can still be recovered.
_MAX_DECAY_OF_STEP = 0.5

Arguments = tuple[float, float, float, float, bool]
"""What the kernel takes: ``lr``, ``decay``, ``beta``, ``input_scale`` and ``is_nesterov``."""


class SGD(NamedTuple):
    """What the direction of an algorithm that is SGD, with factors for each layer, does not take as factors.

    ::

        u = scale * g + (decay + scaled_decay * scale) * w
        v = beta * v + input_scale * u
        direction = u + beta * v  if is_nesterov  else  v
    """

    decay: float
    scaled_decay: float
    beta: float
    is_nesterov: bool

    @classmethod
    def of(cls, algorithm: type[Algorithm], h: Hyperparameters) -> "SGD":
        """Read the numbers off the direction of an algorithm, by evaluating it at 0 and 1."""
        direction = algorithm.direction
        _, decay = direction(1.0, 0.0, 0.0, 0.0, 1.0, h)
        _, decay_of_both = direction(1.0, 0.0, 0.0, 1.0, 1.0, h)
        _, beta = direction(0.0, 0.0, 1.0, 1.0, 1.0, h)
        # A gradient that does not enter v reaches the direction by Nesterov momentum alone.
        ahead, _ = direction(0.0, 1.0, 0.0, 1.0, 0.0, h)
        return cls(decay, decay_of_both - decay, beta, ahead != 0)

    def split(self, rate: float, scale: float, input_scale: float) -> tuple[Arguments, ...]:
        """Split a step along the direction into the fewest steps that the kernel can take.

        Nesterov momentum as the kernel has it is neither scaled nor dampened in its first half. With other
        factors, that half is ``w = w - rate * u``, which also takes ``rate * u`` times its decay from what
        ``v`` is still to be given, and the second half is ``w = w - rate * beta * v``.

        Returns:
            The arguments of one step or two; empty if they are not exact to float32 precision.
        """
        decay, scaled_decay, beta, is_nesterov = self
        in_v = scale * input_scale
        if not _MIN_SCALE < in_v < math.inf:
            return ()
        decay = scaled_decay + decay / scale
        if beta == 0:
            return ((rate * in_v, decay, 0.0, 1.0, False),)
        if scale == 1 or not is_nesterov:
            return ((rate, decay, beta, in_v, is_nesterov),)
        decay_of_step = rate * scale * decay
        if not decay_of_step < _MAX_DECAY_OF_STEP:
            return ()
        second = (rate * beta, decay, beta, in_v / (1 - decay_of_step), False)
        return (rate * scale, decay, 0.0, 1.0, False), second


class CpuSGD(Cpu):
    """The step of an algorithm whose direction is that of :class:`SGD`."""

    @staticmethod
    def why_not(algorithm: type[Algorithm], h: Hyperparameters) -> str | None:
        """Return which hyperparameters the kernel does not support, None if it supports all."""
        if algorithm.used_moments(h) and SGD.of(algorithm, h).beta == 0:
            return "torch's kernel on the CPU does not update a momentum buffer without momentum"
        return None

    def begin(self, batch: Batch) -> None:
        """Begin a step, with these gradients, hyperparameters and learning rate."""
        super().begin(batch)
        self.sgd = SGD.of(self.algorithm, batch.h)

    def _direction_in_advance(self) -> TensorList:
        (v,) = self.state.moments()
        _, *factors = self._factors(1.0)
        steps = self.sgd.split(0.0, *factors)
        # The kernel has no output for a direction that is not v.
        if v is None or self.sgd.is_nesterov or not steps:
            return super()._direction_in_advance()
        for step in steps:  # only updates v
            _call_kernel(self.w, self.g, v, *step)
        return TensorList(v)

    def move(self, ratio: list[float] | None) -> None:
        """Update the weights, and the moments unless :meth:`measure` has; a ratio of None is 1."""
        self.lr = float(self.lr)
        if self.stored_direction is not None:
            assert ratio is not None
            subtract_scaled(self.w, self.stored_direction.value(), [self._factors(each)[0] for each in ratio])
            self._write()
            return
        (v,) = self.state.moments()
        split = self.sgd.split
        steps = [split(*self._factors(each)) for each in ([1.0] if ratio is None else ratio)]
        if not all(steps):
            super().move(1.0 if ratio is None else self.w[0].new_tensor(ratio))
            return
        if ratio is None:
            for step in steps[0]:
                _call_kernel(self.w, self.g, v, *step)
        else:
            for i, (w, g, steps_of_layer) in enumerate(zip(self.w, self.g, steps, strict=True)):
                for step in steps_of_layer:
                    _call_kernel([w], [g], None if v is None else [v[i]], *step)
        self._write()


def _call_kernel(
    weights: list[Tensor],
    grads: list[Tensor],
    v: list[Tensor] | None,
    lr: float,
    decay: float,
    beta: float,
    input_scale: float,
    is_nesterov: bool,
) -> None:
    torch._fused_sgd_(
        weights,
        grads,
        v if v and beta else [],
        weight_decay=decay,
        momentum=beta,
        lr=lr,
        dampening=1 - input_scale,
        nesterov=is_nesterov,
        maximize=False,
        is_first_step=False,
    )
