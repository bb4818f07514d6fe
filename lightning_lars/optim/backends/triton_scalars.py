"""What a kernel finds out once for a layer: its learning rate, the number of its step, and its factors."""

import triton
import triton.language as tl

ADDRESS = ("lr", "ratios", "gradient_scale")
"""Arguments of kernels that may be at any address."""


@triton.jit
def address_in(columns, column, layer, layers):
    """Return where the tensor of a layer begins."""
    return tl.load(columns + column * layers + layer)


@triton.jit
def learning_rate(lr, is_tensor: tl.constexpr):
    """Return a learning rate that is a number, or in a tensor."""
    if is_tensor:
        rate = tl.load(lr)
    else:
        rate = lr
    return rate


@triton.jit
def next_step(columns, column, layer, layers):
    """Return the number of the step that a layer takes, which :func:`count_step` has not counted yet."""
    steps = tl.load(address_in(columns, column, layer, layers).to(tl.pointer_type(tl.float32)))
    return (steps + 1).to(tl.float64)


@triton.jit
def count_step(columns, column, layer, layers):
    """Count a step of a layer, whose count nothing else reads in this launch."""
    at = address_in(columns, column, layer, layers).to(tl.pointer_type(tl.float32))
    tl.store(at, tl.load(at) + 1)


@triton.jit
def count(columns, column, layers):
    """Count a step of all layers."""
    count_step(columns, column, tl.program_id(0), layers)


@triton.jit
def factor_of_layer(number, kind: tl.constexpr, lr, ratio, t):
    """Return what :class:`~lightning_lars.optim.backends.triton_factors.Factor` stands for, in a layer."""
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
    """Return ``1 - exp(x)`` of an ``x`` below 0 in float64, with digits that the difference loses near 0."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4)))
    return tl.where(x > -1e-2, series, 1 - tl.exp(x))


@triton.jit
def root(x):
    """Return the square root, which torch has under another name."""
    return tl.sqrt(x)
