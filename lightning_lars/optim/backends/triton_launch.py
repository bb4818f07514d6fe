"""Launches of kernels that have been launched before with other numbers and addresses."""

from collections.abc import Callable, Hashable
from typing import Any


class Launches:
    """Launches kernels; from the second time on, what Triton compiled the first time.

    To find out which of its compiled kernels some arguments need takes Triton tens of microseconds, ten times
    as long as the launch.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, kernel: Any, variant: Hashable, programs: int, *args: Any) -> None:
        """Launch a kernel.

        Args:
            kernel: Any that Triton has compiled or will.
            variant: What says which of its compiled kernels it is; arguments that differ between launches of
                one variant are numbers, or tensors of one dtype and alignment.
            programs: How many, the same for all launches of one variant.
            *args: All arguments of the kernel.
        """
        launch = self._known.get(variant)
        if launch is not None:
            launch(*args)
            return
        compiled = kernel[(programs,)](*args)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._known[variant] = compiled[(programs, 1, 1)]
