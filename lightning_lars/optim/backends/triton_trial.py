"""A minimal Triton kernel, launched to find out whether Triton works on a device."""

import torch
import triton
import triton.language as tl


@triton.jit
def _add_one(at):
    x = tl.load(at).to(tl.float32) + 1
    tl.store(at, x.to(at.dtype.element_ty))


# The first version with starred arguments and named tuples in kernels.
_OLDEST = (3, 3)


def launch(device: torch.device, dtype: torch.dtype) -> None:
    """Launch a kernel on one element of this dtype.

    Raises:
        Exception: Of various classes, if Triton is too old, has no driver, has no C compiler or Python.h to
            build its launcher with, or does not support the device.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST:
        raise RuntimeError(f"the kernels need triton 3.3 or later (torch 2.7), got {triton.__version__}")
    x = torch.zeros(1, dtype=dtype, device=device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            _add_one[(1,)](x)
    else:
        _add_one[(1,)](x)
