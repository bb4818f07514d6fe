"""Changes an optimizer's hyperparameters for the length of a step, and at no other time."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_lars.learning_rate.optimizer_steps import OptimizerSteps

Adjustment = Callable[[Mapping[str, Any], int], Mapping[str, Any]]
"""Maps a group and the number of a step, from 1, to what it has in it: ``{"lr": 0.1 * group["lr"]}``."""


class LearningRateFactors:
    """The one owner of what a step multiplies its learning rates by.

    Between steps every group holds what its scheduler wrote, so no scheduler computes its next value from
    an adjusted one, and every state dict holds plain values, also one taken inside a step.

    Args:
        optimizer: Any ``torch.optim`` optimizer, or one that wraps it.
        adjustment: Asked as each step begins.
        counts: Asked as each step begins, too. If it says no, the step has plain values and is not counted.

    Raises:
        TypeError: If steps of the optimizer cannot be seen.
    """

    def __init__(
        self, optimizer: Any, adjustment: Adjustment, counts: Callable[[], bool] = lambda: True
    ) -> None:
        self.steps = OptimizerSteps(optimizer, self.apply, self.restore, counts)
        """Counts the steps that happened."""
        self._optimizers = self.steps.optimizers
        self._adjustment = adjustment
        # Group, key, plain value, adjusted value; groups by identity, as a strategy may swap their list.
        self._adjusted: list[tuple[dict[str, Any], str, Any, Any]] = []
        self._hooks = []
        for each in self._optimizers:
            # Lookahead of pytorch_optimizer has step hooks alone, and hands state dicts on to what it wraps.
            if hasattr(each, "_optimizer_state_dict_pre_hooks"):
                self._hooks += [
                    each.register_state_dict_pre_hook(lambda _: self.restore()),
                    each.register_state_dict_post_hook(lambda _, state: self._resume_step(state)),
                    each.register_load_state_dict_pre_hook(lambda *_: self.restore()),
                ]

    def apply(self) -> None:
        """Put the adjusted values into the groups until :meth:`restore`."""
        self.restore()
        groups = self._optimizers[0].param_groups
        if len(self._optimizers) > 1:  # which mostly share their groups
            of_all = (group for each in self._optimizers for group in each.param_groups)
            groups = list({id(group): group for group in of_all}.values())
        # All values first: groups may share one tensor as their learning rate.
        self._adjusted = [
            (group, key, _copy(group[key]), value)
            for group in groups
            for key, value in self._adjustment(group, self.steps.number).items()
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
        self.steps.detach()
        for hook in self._hooks:
            hook.remove()

    def _resume_step(self, state_dict: dict[str, Any]) -> None:
        if not self.steps.is_stepping:
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
