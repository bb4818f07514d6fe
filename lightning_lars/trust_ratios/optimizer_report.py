"""The statistics of one optimizer, and the warnings that follow from them."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from lightning_lars.trust_ratios.alerts import TrustRatioAlerts
from lightning_lars.trust_ratios.excluded_rate_peak import ExcludedRatePeak, excluded_as
from lightning_lars.trust_ratios.layer_statistics import OverSteps
from lightning_lars.trust_ratios.protocols import HasTrustRatios
from lightning_lars.trust_ratios.step_statistics import StepStatistics


class OptimizerReport:
    """Collects the statistics of an optimizer's steps, and returns warnings about its layers and rates.

    Args:
        optimizer: Any optimizer.
        is_measured: As for :class:`~lightning_lars.trust_ratios.step_statistics.StepStatistics`.
        names: Names of parameters, for layers that are unnamed in the optimizer.
        updates: Whether updates are measured.
        gradients: Whether gradients are measured; None: for optimizers without trust ratios.
        is_resumed: Whether the run was resumed, so that the learning rate may be past its peak.
    """

    def __init__(
        self,
        optimizer: Optimizer | HasTrustRatios,
        is_measured: Callable[[], bool],
        names: Mapping[Tensor, str],
        *,
        updates: bool,
        gradients: bool | None,
        is_resumed: bool,
    ) -> None:
        has_ratios = isinstance(optimizer, HasTrustRatios)
        self.statistics = StepStatistics(
            optimizer,
            is_measured,
            names,
            updates=updates,
            gradients=not has_ratios if gradients is None else gradients,
        )
        self._excluded = ExcludedRatePeak(cast(Any, optimizer)) if has_ratios else None
        groups = optimizer.param_groups
        is_larc = all(group.get("trust_clip") == "larc" for group in groups)
        self._alerts = TrustRatioAlerts(is_resumed, excluded_as(groups[0]), clip_is_rule=is_larc)

    def detach(self) -> None:
        """Remove all hooks from the optimizer."""
        self.statistics.detach()
        if self._excluded is not None:
            self._excluded.detach()

    def first_step_warnings(self) -> list[str]:
        """Return warnings about layers whose first step, since the last call, was harmfully long."""
        return self._alerts.check_first_steps(self.statistics.flush_first_steps())

    def layer_warnings(self, quantities: Mapping[str, Mapping[str, OverSteps]]) -> list[str]:
        """Return warnings about layers, from flushed statistics."""
        return self._alerts.check(quantities)

    def rate_warnings(self, total_steps: float | None = None, *, checks_peak: bool = True) -> list[str]:
        """Return warnings about learning rates that were negligible or too high at their peak.

        Args:
            total_steps: Steps of the whole run; None if it has ended.
            checks_peak: Whether the run is long enough for a negligible rate to be a mistake.
        """
        peak = self.statistics.peak
        warnings: list[str] = []
        if peak is not None and checks_peak:
            length = peak.steps if total_steps is None else total_steps
            warnings += self._alerts.check_peak(peak, length, self.statistics.plain_rate)
        excluded = None if self._excluded is None else self._excluded.message()
        return warnings if excluded is None else [*warnings, excluded]
