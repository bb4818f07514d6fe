"""Fast launches of kernels that Triton has compiled before."""

from collections.abc import Callable, Hashable
from typing import Any


class Launches:
    """Launches kernels, and caches the compiled kernel of each variant.

    Triton's own lookup of the compiled kernel from the arguments takes tens of microseconds, ten times as
    long as the launch.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, kernel: Any, variant: Hashable, programs: int, *args: Any, warps: int = 4) -> None:
        """Launch a kernel.

        Args:
            kernel: A function decorated with ``triton.jit``.
            variant: A key of the compiled kernel. Launches of one variant may only differ in numbers, and in
                the addresses of tensors of the same dtype and alignment.
            programs: The size of the grid, the same for all launches of one variant.
            *args: All arguments of the kernel.
            warps: The number of warps of each program.
        """
        launch = self._known.get(variant)
        if launch is not None:
            launch(*args)
            return
        compiled = kernel[(programs,)](*args, num_warps=warps)
        if compiled is not None:  # None from Triton's interpreter, which compiles nothing
            self._known[variant] = compiled[(programs, 1, 1)]
