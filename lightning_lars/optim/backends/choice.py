"""Whether fused kernels can take the step of some layers, and if not, why."""

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import chain

import torch
from torch import Tensor

# Where Triton's kernels run. Its interpreter, for tests, runs them on the CPU.
TRITON_DEVICES = {"cuda"}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DENSE_FORMATS = ((torch.channels_last, 4), (torch.channels_last_3d, 5))


def uses_triton(tensor: Tensor) -> bool:
    """Tell whether the kernels for this tensor are those in Triton."""
    return tensor.device.type in TRITON_DEVICES


@cache
def is_triton_installed() -> bool:
    """Tell whether there is Triton, as torch brings it for GPUs."""
    return find_spec("triton") is not None


def triton_supports(weight: Tensor) -> bool:
    """Tell whether the kernels in Triton can work on weights like this one, where it is."""
    return weight.dtype in _DTYPES and triton_failure(weight.device, weight.dtype) is None


def triton_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why no kernel can be launched on a device, None if one can."""
    if not is_triton_installed():
        return "kernels for GPUs need triton, which is not installed (pip install triton)"
    return trial_launch_failure(device, dtype)


@cache
def trial_launch_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """Launch a kernel, once for each device and dtype; return what went wrong, None if nothing did."""
    try:
        from lightning_lars.optim.backends.triton_trial import launch

        launch(device, dtype)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        return f"triton cannot launch a kernel on {device}: {type(error).__name__}: {first_line}"
    return None


@cache
def warn_of_triton_failure(device: torch.device, dtype: torch.dtype) -> None:
    """Warn, once, if triton is there and cannot launch a kernel on a device."""
    can_try = dtype in _DTYPES and is_triton_installed()
    reason = triton_failure(device, dtype) if can_try else None
    if reason is not None:
        warnings.warn(
            f"{reason}. Steps on {dtype} are unfused there, which takes several times as long. Triton needs "
            "a C compiler, the headers of Python and a GPU that it knows; fused=False says nothing",
            stacklevel=2,
        )


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
    device, takes_triton = weights[0].device, uses_triton(weights[0])
    if not takes_triton and device.type != "cpu":
        return f"there are kernels for CUDA and the CPU, and the parameters are on {device}"
    dtype = weights[0].dtype
    if dtype not in _DTYPES:
        return f"the kernels work in float32, and parameters are {dtype}"
    if takes_triton and (reason := triton_failure(device, dtype)) is not None:
        return reason
    if takes_triton and any(g.dtype is not dtype for g in grads):
        return f"parameters are {dtype} and their gradients are not"
    if not _are_plain([*weights, *grads]):
        return "parameters or gradients are of a subclass of Tensor"
    held = list(chain.from_iterable(moments))
    if not (_are_plain(held) and {moment.dtype for moment in held} <= {torch.float32}):
        return "the state is not held in plain float32 tensors"
    if not all(map(Tensor.is_contiguous, chain(weights, grads, held))) and not _layouts_match(
        weights, grads, moments
    ):
        return "a parameter has gaps in memory, or its gradient or state is laid out in another order"
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
    """Return the state of a layer laid out as its weight is: itself, where it is already or cannot be."""
    is_alike = moment.stride() == weight.stride() or moment.shape != weight.shape
    if is_alike or not (_are_plain([moment]) and _is_dense(weight)):
        return moment
    return torch.empty_like(weight, dtype=moment.dtype).copy_(moment)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or any(
        tensor.ndim == ndim and tensor.is_contiguous(memory_format=memory_format)
        for memory_format, ndim in _DENSE_FORMATS
    )
