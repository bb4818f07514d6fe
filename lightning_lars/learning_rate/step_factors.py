"""Adjusts an optimizer's hyperparameters during each step, and restores them after it."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_lars.learning_rate.optimizer_steps import OptimizerSteps

Adjustment = Callable[[Mapping[str, Any], int], Mapping[str, Any]]
"""Maps a group and a step number, from 1, to its values in that step: ``{"lr": 0.1 * group["lr"]}``."""


class StepFactors:
    """Applies adjusted hyperparameters to an optimizer's groups while it steps.

    Between steps every group holds the scheduler's value, so no scheduler computes its next value from an
    adjusted one, and every state dict holds plain values, even one taken inside a step.

    Args:
        optimizer: Any ``torch.optim`` optimizer, or one that wraps it.
        adjustment: Called for every group when a step begins.
        counts: Also called when a step begins. If it returns False, the step uses plain values and is not
            counted.

    Raises:
        TypeError: If steps of the optimizer cannot be observed.
    """

    def __init__(
        self, optimizer: Any, adjustment: Adjustment, counts: Callable[[], bool] = lambda: True
    ) -> None:
        self.steps = OptimizerSteps(optimizer, self.apply, self.restore, counts)
        """Counts the steps that took place."""
        self._optimizers = self.steps.optimizers
        self._adjustment = adjustment
        # Group, key, plain value, adjusted value; the groups themselves, because a strategy may replace their
        # list.
        self._adjusted: list[tuple[dict[str, Any], str, Any, Any]] = []
        self._hooks = []
        for each in self._optimizers:
            # pytorch_optimizer's Lookahead only has step hooks: the wrapped optimizer has the state dict.
            if hasattr(each, "_optimizer_state_dict_pre_hooks"):
                self._hooks += [
                    each.register_state_dict_pre_hook(lambda _: self.restore()),
                    each.register_state_dict_post_hook(lambda _, state: self._resume_step(state)),
                    each.register_load_state_dict_pre_hook(lambda *_: self.restore()),
                ]

    def apply(self) -> None:
        """Write the adjusted values into the groups, until :meth:`restore`."""
        self.restore()
        groups = self._optimizers[0].param_groups
        if len(self._optimizers) > 1:  # which mostly share their groups
            all_groups = (group for each in self._optimizers for group in each.param_groups)
            groups = list({id(group): group for group in all_groups}.values())
        # Compute all values first: groups may share one tensor as their learning rate.
        self._adjusted = [
            (group, key, _copy(group[key]), value)
            for group in groups
            for key, value in self._adjustment(group, self.steps.number).items()
        ]
        for group, key, _, value in self._adjusted:
            _write(group, key, value)

    def restore(self) -> None:
        """Write the plain values back, except where other code has changed a value in the meantime."""
        for group, key, plain, value in self._adjusted:
            if isinstance(group[key], Tensor) or group[key] == value:
                _write(group, key, plain)
        self._adjusted = []

    def detach(self) -> None:
        """Restore the plain values and remove all hooks."""
        self.restore()
        self.steps.detach()
        for hook in self._hooks:
            hook.remove()

    def _resume_step(self, state_dict: dict[str, Any]) -> None:
        if not self.steps.is_stepping:
            return
        # The state dict holds the same tensors that the rest of the step adjusts again.
        for group in state_dict["param_groups"]:
            group.update({key: _copy(value) for key, value in group.items()})
        self.apply()


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _write(group: dict[str, Any], key: str, value: Any) -> None:
    # A tensor learning rate is updated in place: compiled steps and CUDA graphs refer to it.
    if isinstance(group[key], Tensor):
        group[key].copy_(value)
    else:
        group[key] = value
