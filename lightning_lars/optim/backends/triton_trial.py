"""The smallest kernel in Triton, to see whether one can be launched at all."""

import torch
import triton
import triton.language as tl


@triton.jit
def _add_one(at):
    x = tl.load(at).to(tl.float32) + 1
    tl.store(at, x.to(at.dtype.element_ty))


# The first that has starred arguments and named tuples.
_OLDEST = (3, 3)


def launch(device: torch.device, dtype: torch.dtype) -> None:
    """Launch it, on one element of this dtype.

    Raises:
        Exception: Of many classes, if Triton is too old, or has no driver, no C compiler or Python.h to build
            its launcher with, or no code for the device.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST:
        raise RuntimeError(f"the kernels need triton 3.3 or later (torch 2.7), got {triton.__version__}")
    x = torch.zeros(1, dtype=dtype, device=device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            _add_one[(1,)](x)
    else:
        _add_one[(1,)](x)
