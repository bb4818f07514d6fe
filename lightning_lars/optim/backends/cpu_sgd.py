"""A back end for LARS and NovoGrad on the CPU, built on torch's fused SGD kernel.

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

# The smallest decay whose product with a weight is not a subnormal number in float32.
_MIN_DECAY = 1e-30

# The largest fraction of g + decay * w that the first half of a step may take, so that the second half can
# recover it without much rounding.
_MAX_DECAY_OF_STEP = 0.5

Arguments = tuple[float, float, float, float, bool]
"""What the kernel takes: ``lr``, ``decay``, ``beta``, ``input_scale`` and ``is_nesterov``."""


class SGD(NamedTuple):
    """The numbers in the direction of an SGD-like algorithm that are the same for all layers.

    ``scale`` and ``input_scale`` are factors of each layer::

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
        """Find the numbers by evaluating the direction of an algorithm at 0 and 1."""
        direction = algorithm.direction
        _, decay = direction(1.0, 0.0, 0.0, 0.0, 1.0, h)
        _, decay_of_both = direction(1.0, 0.0, 0.0, 1.0, 1.0, h)
        _, beta = direction(0.0, 0.0, 1.0, 1.0, 1.0, h)
        # A gradient that does not enter v reaches the direction by Nesterov momentum alone.
        ahead, _ = direction(0.0, 1.0, 0.0, 1.0, 0.0, h)
        return cls(decay, decay_of_both - decay, beta, ahead != 0)

    def split(self, rate: float, scale: float, input_scale: float) -> tuple[Arguments, ...]:
        """Split a step along the direction into the fewest steps that the kernel can take.

        The kernel can neither scale nor dampen the ``u`` in Nesterov's direction. Such a step takes two:
        ``w = w - rate * u`` without momentum, after which ``g + decay * w`` is smaller by the factor
        ``1 - rate * scale * decay``, and then ``w = w - rate * beta * v``.

        Returns:
            The arguments of one step or two; empty if they are not exact to float32 precision.
        """
        decay, scaled_decay, beta, is_nesterov = self
        in_v = scale * input_scale
        if not 0 < in_v < math.inf:
            return ()
        decay = scaled_decay + decay / scale
        if 0 < decay < _MIN_DECAY:
            return ()
        if beta == 0:
            return ((rate * in_v, decay, 0.0, 1.0, False),)
        if in_v < _MIN_SCALE:
            return ()
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
            return "torch's kernel on the CPU needs momentum (betas[0] above 0)"
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
        for step in steps:  # with lr=0, to update v
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
