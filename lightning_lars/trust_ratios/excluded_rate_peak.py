"""Warns if excluded parameters, which take plain SGD or Adam steps, have too high a learning rate."""

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
"""A rate to start with, and published recipes that exceed the limit."""

# Several callbacks watch an optimizer, and only one reports.
_reported: WeakSet[Any] = WeakSet()


def excluded_as(group: Mapping[str, Any]) -> str:
    """Return which algorithm updates a group without adaptation: ``"SGD"``, or ``"Adam"`` for LAMB."""
    return "Adam" if "bias_correction" in group else "SGD"


class ExcludedRatePeak:
    """Tracks the peak learning rate of the groups without adaptation, inside each step, on its device.

    Args:
        optimizer: An optimizer with trust ratios. Without any adapted group, nothing is tracked: it is plain
            SGD or Adam by choice. With only one adapted layer, neither: that is a linear probe, whose bias
            does train at such rates (MAE's is 6.4).

    Example:
        >>> import torch
        >>> from lightning_lars import LARS
        >>> from lightning_lars.trust_ratios.excluded_rate_peak import ExcludedRatePeak
        >>> v, w, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
        >>> optimizer = LARS([{"params": [v, w]}, {"params": [b], "layer_adaptation": False}], lr=3.0)
        >>> peak = ExcludedRatePeak(optimizer)
        >>> optimizer.step()
        >>> print(peak.message()[:63])
        LARS moves excluded parameters (1 of them) at a learning rate o
        >>> print(peak.message())
        None
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._peak = PeakRate()
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def detach(self) -> None:
        """Remove the hook from the optimizer."""
        self._hook.remove()

    def is_on_host(self) -> bool:
        """Return whether :meth:`message` needs no synchronization."""
        return self._peak.state().device.type == "cpu"

    def message(self) -> str | None:
        """Return a warning, once for each optimizer, if the rate was one that rarely trains."""
        excluded = self._excluded()
        if not excluded or self._optimizer in _reported:
            return None
        kind = excluded_as(excluded[0])
        rate, limit = self._peak.read().value, SELDOM_ABOVE[kind]
        if rate <= limit * (1 + 1e-6):  # the rate may be in single precision
            return None
        _reported.add(self._optimizer)
        number = sum(len(group["params"]) for group in excluded)
        good, published = GOOD[kind]
        name = type(self._optimizer).__name__
        return (
            f"{name} moves excluded parameters ({number} of them) at a learning rate of {rate:.4g} so far. "
            f"That is plain {kind}, which rarely trains above {limit:g}{published}, and the first to diverge "
            f"as lr grows. Set a separate rate for them, for example excluded_lr={good}, or "
            "excluded_lr_scale, unless this is intended"
        )

    def _before_step(self, *_: Any) -> None:
        # By now, the learning rate has been adjusted for the step.
        rates = [group["lr"] for group in self._excluded()]
        if rates:
            self._peak.update(largest(rates))

    def _excluded(self) -> list[dict[str, Any]]:
        groups = [group for group in self._optimizer.param_groups if group["params"]]
        excluded = [group for group in groups if not group.get("layer_adaptation", True)]
        adapted = sum(len(group["params"]) for group in groups if group.get("layer_adaptation", True))
        return excluded if adapted > 1 else []
