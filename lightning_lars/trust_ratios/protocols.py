"""The methods of an optimizer that statistics of its steps are read from."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_lars.optim.last_trust_ratios import StackedTrustRatios

FLAGS = ("at_trust_clip", "at_zero_rule", "by_decay_alone")
"""Methods of LARS and LAMB that return a flag for each layer of their last step."""


@runtime_checkable
class HasTrustRatios(Protocol):
    """A ``torch.optim.Optimizer`` that reports the trust ratio of every layer in its last step."""

    param_groups: list[dict[str, Any]]

    def trust_ratios(self) -> dict[str, Tensor]:
        """Return 0-d tensors by parameter name."""
        ...

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Call the hook before every step."""
        ...

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """Call the hook after every step."""
        ...


@runtime_checkable
class StacksTrustRatios(Protocol):
    """An optimizer that also reports, for every layer with a trust ratio, why its last step moved it."""

    def stacked_trust_ratios(self) -> StackedTrustRatios | None:
        """Return vectors over the layers of the last step, or None if there was none."""
        ...
