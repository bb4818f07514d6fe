"""How fast what is excluded moves, which the optimizer takes for plain SGD or Adam, and what to say of it."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer

from lightning_lars.trust_ratios.peak_rate import PeakRate, largest

SELDOM_ABOVE = {"SGD": 1.0, "Adam": 0.05}
"""Learning rates above which these rarely train."""

GOOD = {
    "SGD": ("0.05", ", though ResNets with batch normalization were published so (SimCLR, BYOL, MLPerf)"),
    "Adam": ("0.01", ""),
}
"""A rate to begin with, and who trains above."""

# Several callbacks watch, and one says it.
_told: WeakSet[Any] = WeakSet()


def excluded_as(group: Mapping[str, Any]) -> str:
    """Return what a group without adaptation is: ``"SGD"`` of LARS and NovoGrad, or ``"Adam"`` of LAMB."""
    return "Adam" if "bias_correction" in group else "SGD"


class ExcludedRatePeak:
    """Follows the learning rate of the groups without adaptation, inside of each step, on its device.

    Args:
        optimizer: One with trust ratios. Without a group that is adapted, nothing is followed: it is plain
            SGD or Adam by choice.

    Example:
        >>> import torch
        >>> from lightning_lars import LARS
        >>> from lightning_lars.trust_ratios.excluded_rate_peak import ExcludedRatePeak
        >>> w, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        >>> optimizer = LARS([{"params": [w]}, {"params": [b], "layer_adaptation": False}], lr=3.0)
        >>> peak = ExcludedRatePeak(optimizer)
        >>> optimizer.step()
        >>> print(peak.message()[:63])
        LARS moves what is excluded (1 parameters) at a learning rate o
        >>> print(peak.message())
        None
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._peak = PeakRate()
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def detach(self) -> None:
        """Leave the optimizer as it was."""
        self._hook.remove()

    def is_on_host(self) -> bool:
        """Tell whether :meth:`message` waits for no device."""
        return self._peak.state().device.type == "cpu"

    def message(self) -> str | None:
        """Return what to say if the rate was one that rarely trains, once for each optimizer."""
        excluded = self._excluded()
        if not excluded or self._optimizer in _told:
            return None
        kind = excluded_as(excluded[0])
        rate, limit = self._peak.read().value, SELDOM_ABOVE[kind]
        if rate <= limit * (1 + 1e-6):  # it may come in single precision
            return None
        _told.add(self._optimizer)
        number = sum(len(group["params"]) for group in excluded)
        good, published = GOOD[kind]
        name = type(self._optimizer).__name__
        return (
            f"{name} moves what is excluded ({number} parameters) at a learning rate of {rate:.4g} so far. "
            f"That is plain {kind}, which rarely trains above {limit:g}{published}, and the first to diverge "
            f"as lr grows. Give it a rate of its own, excluded_lr={good} or so, or excluded_lr_scale, unless "
            "this is meant"
        )

    def _before_step(self, *_: Any) -> None:
        # Whoever adjusts the learning rate for the length of a step has done so.
        rates = [group["lr"] for group in self._excluded()]
        if rates:
            self._peak.update(largest(rates))

    def _excluded(self) -> list[dict[str, Any]]:
        groups = [group for group in self._optimizer.param_groups if group["params"]]
        excluded = [group for group in groups if not group.get("layer_adaptation", True)]
        return excluded if len(excluded) < len(groups) else []
