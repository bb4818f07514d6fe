"""Counts the optimizer steps that took place."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def _nothing() -> None:
    return None


def _always() -> bool:
    return True


class OptimizerSteps:
    """Counts the steps of an optimizer that took place, regardless of where its ``step()`` was called.

    A call of ``step()``, of the optimizer or of one that it wraps (Lookahead, SAM), counts if

    - a parameter had a gradient when the update began or when it ended;
    - no gradient scaler skipped the update;
    - it was not a trial. ``torch.distributed.checkpoint`` takes one to initialize empty state, with gradients
      of 0 at a learning rate of 0.

    Calls of a wrapped optimizer within its wrapper's call are part of the same step, and so are all
    evaluations of a closure. Consecutive calls over different parameters are one step: DeepSpeed ZeRO calls
    ``step()`` once per group.

    Args:
        optimizer: A ``torch.optim`` optimizer, or an object that holds or wraps one or more.
        before: Called when a step begins, and again after a closure.
        after: Called when a step ends, and before a closure, because the closure is the caller's code.
        counts: Called when a step begins. If it returns False, the step is ignored.

    Raises:
        TypeError: If neither the optimizer nor one that it wraps calls step hooks.
    """

    def __init__(
        self,
        optimizer: Any,
        before: Callable[[], None] = _nothing,
        after: Callable[[], None] = _nothing,
        counts: Callable[[], bool] = _always,
    ) -> None:
        self.taken = 0
        """Steps that took place. May be set, to continue from a checkpoint."""
        optimizers = [each for each in _wrapped(optimizer) if _calls_step_hooks(each)]
        if not optimizers:
            raise TypeError(
                f"optimizer must call step hooks, or wrap a torch.optim optimizer that does, got a "
                f"{type(optimizer).__name__}, whose steps cannot be observed"
            )
        # An optimizer holds its hooks: a strong reference would be a cycle that keeps it in memory.
        self._optimizers = [ref(each) for each in optimizers]
        self._before, self._after, self._counts = before, after, counts
        self._stepping: Optimizer | None = None
        self._number = 1
        self._has_gradients = self._is_skipped = False
        # Parameters, by identity, of the calls that make up the latest step, and of the current call.
        self._held_by_step: set[int] = set()
        self._held_by_call: set[int] = set()
        self._is_counted = False
        self._hooks: list[RemovableHandle] = []
        for each in optimizers:
            self._hooks += [
                each.register_step_pre_hook(self._enter),
                each.register_step_post_hook(self._leave),
            ]

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizer and those that it wraps, as far as they call step hooks."""
        return [each for refers in self._optimizers if (each := refers()) is not None]

    @property
    def is_stepping(self) -> bool:
        """Whether a step is in progress, and not in its closure."""
        return self._stepping is not None

    @property
    def number(self) -> int:
        """The number, from 1, of the step in progress, or of the next one."""
        return self._number if self.is_stepping else self.taken + 1

    def detach(self) -> None:
        """Remove all hooks from the optimizer."""
        self._stepping = None
        for hook in self._hooks:
            hook.remove()

    def _enter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        closure = _closure(args, kwargs)
        if self._stepping not in (None, optimizer):  # a wrapped optimizer, in the step of its wrapper
            self._look_for_gradients(optimizer, closure is None)
            return None
        # An optimizer that is still stepping has left its last step by an exception.
        self._stepping = None
        if not self._counts() or _is_trial(optimizer, args, kwargs):
            return None
        self._begin(optimizer)
        self._look_for_gradients(optimizer, closure is None)
        self._before()
        if closure is None:
            return None
        if "closure" in kwargs:
            return args, {**kwargs, "closure": self._outside_of_step(optimizer, closure)}
        return (args[0], self._outside_of_step(optimizer, closure), *args[2:]), kwargs

    def _begin(self, optimizer: Optimizer) -> None:
        self._stepping = optimizer
        self._has_gradients = self._is_skipped = False
        self._held_by_call = set()
        if not torch.compiler.is_compiling():  # steps that are called group by group are never compiled
            self._held_by_call = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not self._held_by_call or not self._held_by_call.isdisjoint(self._held_by_step):
            self._held_by_step, self._is_counted = set(), False
        self._number = self.taken if self._held_by_step and self._is_counted else self.taken + 1

    def _outside_of_step(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def outside_of_step() -> Any:
            self._stepping = None
            self._after()
            loss = closure()
            self._stepping = optimizer
            # Gradients from before the closure may be gone: training_step returned None.
            self._look_for_gradients(optimizer)
            self._before()
            return loss

        return outside_of_step

    def _leave(self, optimizer: Optimizer, *_: Any) -> None:
        if self._stepping is None:  # in an ignored step, or in a step() that calls super().step()
            return
        self._look_for_gradients(optimizer)
        # A fused optimizer is called even where the gradient scaler makes it skip the update.
        self._is_skipped = self._is_skipped or bool(getattr(optimizer, "found_inf", False))
        if self._stepping is not optimizer:
            return
        self._stepping = None
        self._after()
        self._held_by_step |= self._held_by_call
        if self._has_gradients and not self._is_skipped and not self._is_counted:
            self.taken += 1
            self._is_counted = True

    def _look_for_gradients(self, optimizer: Optimizer, enabled: bool = True) -> None:
        if enabled and not self._has_gradients:
            groups = optimizer.param_groups
            self._has_gradients = any(p.grad is not None for group in groups for p in group["params"])


_seen: WeakKeyDictionary[Optimizer, OptimizerSteps] = WeakKeyDictionary()


def observed_steps(optimizer: Optimizer) -> int:
    """Return the number of steps of an optimizer since the first call of this function for it.

    Steps that cannot be observed do not count, nor do compiled ones, which counting would recompile.
    """
    if optimizer not in _seen:
        try:
            _seen[optimizer] = OptimizerSteps(optimizer, counts=lambda: not torch.compiler.is_compiling())
        except TypeError:
            return 0
    return _seen[optimizer].taken


def _wrapped(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and, from the outside in, the wrapped optimizers that step the same parameters."""
    seen: list[Any] = []
    waiting = [optimizer]
    while waiting:
        each = waiting.pop(0)
        if any(each is other for other in seen):
            continue
        seen.append(each)
        yield each
        for value in getattr(each, "__dict__", {}).values():
            if isinstance(value, Mapping):
                value = list(value.values())
            inner = value if isinstance(value, list | tuple) else [value]
            waiting += [one for one in inner if isinstance(one, Optimizer) and _share(one, optimizer)]


def _share(optimizer: Optimizer, other: Any) -> bool:
    # By groups too: with DeepSpeed ZeRO stage 3 they are empty between steps.
    groups, others = optimizer.param_groups, other.param_groups
    if any(group is another for group in groups for another in others):
        return True
    params = {id(p) for group in others for p in group["params"]}
    return any(id(p) in params for group in groups for p in group["params"])


def _calls_step_hooks(optimizer: Any) -> bool:
    # torch wraps `step` in `Optimizer.__init__`, which some wrappers of optimizers do not call.
    hooked = getattr(getattr(type(optimizer), "step", None), "hooked", False)
    return isinstance(optimizer, Optimizer) and hooked and hasattr(optimizer, "_optimizer_step_pre_hooks")


def _is_trial(optimizer: Optimizer, args: Any, kwargs: Any) -> bool:
    """Return whether ``torch.distributed.checkpoint`` takes this step, to initialize state."""
    passes_none = ("closure" in kwargs or len(args) > 1) and _closure(args, kwargs) is None
    if not passes_none or optimizer.state:
        return False
    # Last, because reading values may synchronize with a GPU.
    return all(
        not group.get("lr", 0) and not any(_is_nonzero(p.grad) for p in group["params"])
        for group in optimizer.param_groups
    )


def _closure(args: Any, kwargs: Any) -> Any:
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def _is_nonzero(grad: Tensor | None) -> bool:
    return grad is not None and (grad.is_sparse or bool(grad.any()))
