"""Decides whether fused kernels support the step of some layers, and if not, gives the reason."""

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import chain

import torch
from torch import Tensor

# Device types that use the Triton kernel. Tests add the CPU, for Triton's interpreter.
TRITON_DEVICES = {"cuda"}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DENSE_FORMATS = ((torch.channels_last, 4), (torch.channels_last_3d, 5))


def uses_triton(tensor: Tensor) -> bool:
    """Return whether fused steps on the device of this tensor use Triton."""
    return tensor.device.type in TRITON_DEVICES


@cache
def is_triton_installed() -> bool:
    """Return whether Triton is installed, as it is with torch for GPUs."""
    return find_spec("triton") is not None


def triton_supports(weight: Tensor) -> bool:
    """Return whether the Triton kernel supports weights of this dtype on this device."""
    return weight.dtype in _DTYPES and triton_failure(weight.device, weight.dtype) is None


def triton_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton cannot launch a kernel on a device, None if it can."""
    if not is_triton_installed():
        return "fused steps on a GPU need triton, which is not installed (pip install triton)"
    return trial_launch_failure(device, dtype)


@cache
def trial_launch_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """Launch a test kernel, once for each device and dtype; return the error, None if it succeeds."""
    try:
        from lightning_lars.optim.backends.triton_trial import launch

        launch(device, dtype)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        return f"triton cannot launch a kernel on {device}: {type(error).__name__}: {first_line}"
    return None


@cache
def warn_of_triton_failure(device: torch.device, dtype: torch.dtype) -> None:
    """Warn, once, if Triton is installed but cannot launch a kernel on a device."""
    can_try = dtype in _DTYPES and is_triton_installed()
    reason = triton_failure(device, dtype) if can_try else None
    if reason is not None:
        warnings.warn(
            f"{reason}. Steps on {dtype} are unfused there, which takes several times as long. Triton needs "
            "a C compiler, the Python headers and a supported GPU; fused=False silences this warning",
            stacklevel=2,
        )


def why_not_fused(
    weights: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Sequence[Tensor]]
) -> str | None:
    """Return why fused kernels do not support these layers, None if they do.

    Args:
        weights: The weights of each layer, all of one dtype and device.
        grads: The gradient of each layer.
        moments: The moments of each layer, as far as they exist.
    """
    if torch.compiler.is_compiling():
        return "torch.compile fuses the operations of a step itself"
    device, takes_triton = weights[0].device, uses_triton(weights[0])
    if not takes_triton and device.type != "cpu":
        return f"fused kernels exist for CUDA and the CPU, and the parameters are on {device}"
    dtype = weights[0].dtype
    if dtype not in _DTYPES:
        return f"fused kernels compute in float32, and the parameters are {dtype}"
    if takes_triton and (reason := triton_failure(device, dtype)) is not None:
        return reason
    if takes_triton and any(g.dtype is not dtype for g in grads):
        return f"the parameters are {dtype} and their gradients are not"
    if not _are_plain([*weights, *grads]):
        return "parameters or gradients are instances of a subclass of Tensor"
    held = list(chain.from_iterable(moments))
    if not (_are_plain(held) and {moment.dtype for moment in held} <= {torch.float32}):
        return "the state is not stored in plain float32 tensors"
    if not all(map(Tensor.is_contiguous, chain(weights, grads, held))) and not _layouts_match(
        weights, grads, moments
    ):
        return "a parameter is not dense in memory, or its gradient or state has another memory layout"
    return None


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    return set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}


def _layouts_match(
    weights: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Sequence[Tensor]]
) -> bool:
    return all(
        all(map(Tensor.is_contiguous, (w, g, *own)))
        or (_is_dense(w) and all(other.stride() == w.stride() for other in (g, *own)))
        for w, g, own in zip(weights, grads, moments, strict=True)
    )


def match_layout(weight: Tensor, moment: Tensor) -> Tensor:
    """Return a moment in the memory layout of its weights, if it is not yet and can be."""
    is_alike = moment.stride() == weight.stride() or moment.shape != weight.shape
    if is_alike or not (_are_plain([moment]) and _is_dense(weight)):
        return moment
    return torch.empty_like(weight, dtype=moment.dtype).copy_(moment)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or any(
        tensor.ndim == ndim and tensor.is_contiguous(memory_format=memory_format)
        for memory_format, ndim in _DENSE_FORMATS
    )
