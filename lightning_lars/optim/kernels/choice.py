"""Whether fused kernels can take the step of some layers, and if not, why."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

# Where Triton's kernels run. Its interpreter, for tests, runs them on the CPU.
TRITON_DEVICES = {"cuda"}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DENSE = ((torch.channels_last, 4), (torch.channels_last_3d, 5))


def takes_triton(tensor: Tensor) -> bool:
    """Tell whether the kernels for this tensor are those in Triton."""
    return tensor.device.type in TRITON_DEVICES


def why_not_fused(
    weights: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Sequence[Tensor]]
) -> str | None:
    """Return why no kernel can work on these layers, None if one can.

    Args:
        weights: Of each layer, all of one dtype and device.
        grads: Of each layer.
        moments: What each layer has in its state, where it has it already.
    """
    if torch.compiler.is_compiling():
        return "torch.compile fuses the operations of a step by itself"
    device = weights[0].device
    if takes_triton(weights[0]):
        if find_spec("triton") is None:
            return "kernels for GPUs need triton, which is not installed (pip install triton)"
    elif device.type != "cpu":
        return f"there are kernels for CUDA and the CPU, and the parameters are on {device}"
    dtype = weights[0].dtype
    if dtype not in _DTYPES:
        return f"the kernels work in float32, and parameters are {dtype}"
    if takes_triton(weights[0]) and any(g.dtype is not dtype for g in grads):
        return f"parameters are {dtype} and their gradients are not"
    for w, g, own in zip(weights, grads, moments, strict=True):
        if not (_is_plain(w) and _is_plain(g)):
            return "parameters or gradients are of a subclass of Tensor"
        if not all(_is_plain(moment) and moment.dtype is torch.float32 for moment in own):
            return "the state is not held in plain float32 tensors"
        if not (w.is_contiguous() and g.is_contiguous() and all(moment.is_contiguous() for moment in own)):
            same = all(other.stride() == w.stride() for other in (g, *own))
            if not (same and _has_no_gaps(w)):
                return "a parameter has gaps in memory, or its gradient or state is laid out in another order"
    return None


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _has_no_gaps(tensor: Tensor) -> bool:
    return any(
        tensor.ndim == ndim and tensor.is_contiguous(memory_format=memory_format)
        for memory_format, ndim in _DENSE
    )
