"""The scalars that a program computes once for its layer: learning rate, step number and factors."""

import triton
import triton.language as tl

ADDRESS = ("lr", "ratios", "gradient_scale")
"""Pointer arguments of kernels for whose alignment Triton must not specialize."""


@triton.jit
def address_in(columns, column, layer, layers):
    """Return the address of a tensor of a layer."""
    return tl.load(columns + column * layers + layer)


@triton.jit
def learning_rate(lr, is_tensor: tl.constexpr):
    """Return the learning rate, which is a number or a pointer to a 0-d tensor."""
    if is_tensor:
        rate = tl.load(lr)
    else:
        rate = lr
    return rate


@triton.jit
def next_step(columns, column, layer, layers):
    """Return the number of the current step of a layer, before :func:`count_step` increments it."""
    steps = tl.load(address_in(columns, column, layer, layers).to(tl.pointer_type(tl.float32)))
    return (steps + 1).to(tl.float64)


@triton.jit
def count_step(columns, column, layer, layers):
    """Increment the step of a layer, which no other program of the launch may read."""
    at = address_in(columns, column, layer, layers).to(tl.pointer_type(tl.float32))
    tl.store(at, tl.load(at) + 1)


@triton.jit
def count(columns, column, layers):
    """Increment the step of every layer."""
    count_step(columns, column, tl.program_id(0), layers)


@triton.jit
def factor_of_layer(number, kind: tl.constexpr, lr, ratio, t):
    """Return the value of a :class:`~lightning_lars.optim.backends.triton_factors.Factor` for a layer."""
    if kind == "lr":
        factor = number * lr
    elif kind == "ratio":
        factor = number * ratio
    elif kind == "lr * ratio":
        factor = number * (lr * ratio)
    elif kind == "1 - exp(t)":
        factor = _one_minus_exp(t * number).to(tl.float32)
    else:
        factor = number
    return factor


@triton.jit
def _one_minus_exp(x):
    """Return ``1 - exp(x)`` for ``x < 0`` in float64, without cancellation near 0."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4)))
    return tl.where(x > -1e-2, series, 1 - tl.exp(x))


@triton.jit
def root(x):
    """Return the square root; bound to the name ``sqrt`` in the equations."""
    return tl.sqrt(x)
