"""Calls a function right before an optimizer's update, when all gradients are complete."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class BeforeSteps:
    """Calls a function once before each step: when the step is announced, or in a hook of the optimizer.

    Lightning announces the steps of its own wrapper around the optimizer, not steps of the optimizer itself,
    which manual optimization may call (``optimizers(use_pl_optimizer=False)``).

    Args:
        optimizer: The optimizer. Steps of wrappers without the hooks of ``torch.optim`` must be announced.
        call: Called before each step; with a closure, every time after it has computed the gradients.

    Example:
        >>> import torch
        >>> from lightning_lars.gradients.before_steps import BeforeSteps
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
        >>> steps = BeforeSteps(optimizer, lambda: print("before a step"))
        >>> optimizer.step()
        before a step
        >>> steps.announce()
        before a step
        >>> optimizer.step()
        >>> steps.number
        2
    """

    def __init__(self, optimizer: Optimizer, call: Callable[[], None]) -> None:
        self.number = 0
        """Number of calls so far."""
        self._call = call
        self._is_announced = False
        self._hook: RemovableHandle | None = None
        # Some wrappers subclass Optimizer without calling its __init__.
        if hasattr(optimizer, "_optimizer_step_pre_hooks"):
            self._hook = optimizer.register_step_pre_hook(self._before_step)

    def announce(self) -> None:
        """Call the function now, and not in the step that follows."""
        self._is_announced = True
        self._count()

    def reset(self) -> None:
        """Withdraw the announcement of a step that a gradient scaler has skipped."""
        self._is_announced = False

    def detach(self) -> None:
        """Remove the hook from the optimizer."""
        if self._hook is not None:
            self._hook.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if kwargs.get("closure") is not None:
            kwargs = {**kwargs, "closure": self._after(kwargs["closure"])}
        elif len(args) > 1 and args[1] is not None:
            args = (args[0], self._after(args[1]), *args[2:])
        else:
            self._unless_announced()
        return args, kwargs

    def _after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_and_call() -> Any:
            loss = closure()
            self._unless_announced()
            return loss

        return closure_and_call

    def _unless_announced(self) -> None:
        if not self._is_announced:
            self._count()
        self._is_announced = False

    def _count(self) -> None:
        self.number += 1
        self._call()
