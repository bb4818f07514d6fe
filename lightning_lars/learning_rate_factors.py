"""Changes an optimizer's hyperparameters for the length of a step, and at no other time."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Adjustment = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Maps a parameter group to the values that it has during the next step: ``{"lr": 0.1 * group["lr"]}``."""


class LearningRateFactors:
    """The one owner of what a step multiplies its learning rates by.

    Between steps every group holds what its scheduler wrote, so no scheduler computes its next value from
    an adjusted one, and every state dict holds plain values, also one taken inside a step.

    Args:
        optimizer: Any ``torch.optim`` optimizer.
        adjustment: Asked as each step begins.
    """

    def __init__(self, optimizer: Optimizer, adjustment: Adjustment) -> None:
        self.steps = 0
        """Steps that had gradients, since this was built."""
        self._optimizer = optimizer
        self._adjustment = adjustment
        self._in_step = False
        # Group, key, plain value, adjusted value; groups by identity, as a strategy may swap their list.
        self._adjusted: list[tuple[dict[str, Any], str, Any, Any]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(lambda _: self.restore()),
            optimizer.register_state_dict_post_hook(lambda _, state: self._resume_step(state)),
            optimizer.register_load_state_dict_pre_hook(lambda *_: self.restore()),
        ]

    def apply(self) -> None:
        """Put the adjusted values into the groups until :meth:`restore`."""
        self.restore()
        # All values first: groups may share one tensor as their learning rate.
        self._adjusted = [
            (group, key, _copy(group[key]), value)
            for group in self._optimizer.param_groups
            for key, value in self._adjustment(group).items()
        ]
        for group, key, _, value in self._adjusted:
            _write(group, key, value)

    def restore(self) -> None:
        """Put the plain values back, except where someone else has written in between."""
        for group, key, plain, value in self._adjusted:
            if isinstance(group[key], Tensor) or group[key] == value:
                _write(group, key, plain)
        self._adjusted = []

    def detach(self) -> None:
        """Leave the optimizer as it was."""
        self.restore()
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._in_step = True
        self.apply()
        # The closure is the caller's code (Lightning's training_step), which may step a scheduler.
        if kwargs.get("closure") is not None:
            kwargs = {**kwargs, "closure": self._outside_of_step(kwargs["closure"])}
        elif len(args) > 1 and args[1] is not None:
            args = (args[0], self._outside_of_step(args[1]), *args[2:])
        return args, kwargs

    def _outside_of_step(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def with_plain_values() -> Any:
            self._in_step = False
            self.restore()
            loss = closure()
            self._in_step = True
            self.apply()
            return loss

        return with_plain_values

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._in_step = False
        self.restore()
        # A fused optimizer is called even where the gradient scaler makes it skip the step.
        if getattr(optimizer, "found_inf", False):
            return
        # A step without gradients (training_step returned None) has moved nothing.
        self.steps += any(p.grad is not None for group in optimizer.param_groups for p in group["params"])

    def _resume_step(self, state_dict: dict[str, Any]) -> None:
        if not self._in_step:
            return
        # The state dict holds the very tensors that the rest of the step adjusts again.
        for group in state_dict["param_groups"]:
            group.update({key: _copy(value) for key, value in group.items()})
        self.apply()


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _write(group: dict[str, Any], key: str, value: Any) -> None:
    # A learning rate that is a tensor keeps its identity: compiled steps and CUDA graphs hold on to it.
    if isinstance(group[key], Tensor):
        group[key].copy_(value)
    else:
        group[key] = value
