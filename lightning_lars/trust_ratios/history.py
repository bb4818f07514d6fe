"""The history of trust ratios, or updates, over a whole run, in bounded memory, for plots and tables."""

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_lars.rules import as_int, is_whole, require
from lightning_lars.trust_ratios.layer_statistics import OverSteps

_DRAWN = ("trust_ratio", "update_to_weight", "effective_lr")


@dataclass
class OverRun:
    """Statistics of one quantity of one layer over all records of a run."""

    records: int = 0
    mean: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf
    last: float = math.nan

    def add(self, value: OverSteps) -> None:
        """Add a record."""
        self.records += 1
        self.mean += (value.mean - self.mean) / self.records
        self.minimum = min(self.minimum, value.minimum)
        self.maximum = max(self.maximum, value.maximum)
        self.last = value.mean


class TrustRatioHistory:
    """Time series of trust ratios and effective learning rates, and statistics of all quantities, by layer.

    Layers without a trust ratio have a series of update-to-weight ratios. Beyond ``max_records``, every
    second record of the series is dropped, and from then on only every second one is kept. The statistics
    cover all records.

    Args:
        max_records: Maximum number of records to keep, an even number above 0.

    Example:
        >>> from lightning_lars.trust_ratios.layer_statistics import OverSteps
        >>> from lightning_lars.trust_ratios.history import TrustRatioHistory
        >>> history = TrustRatioHistory(max_records=2)
        >>> for step in range(5):
        ...     history.record(step, {"trust_ratio": {"conv.weight": OverSteps(step, step, step)}})
        >>> history.steps, history.series("trust_ratio")
        ([0, 4], {'conv.weight': [0.0, 4.0]})
        >>> history.statistics["trust_ratio"]["conv.weight"].mean
        2.0
    """

    def __init__(self, max_records: int = 512) -> None:
        is_even = is_whole(max_records) and max_records > 0 and max_records % 2 == 0
        require("max_records", "an even number above 0", max_records, is_even)
        self.max_records = as_int(max_records)
        self.steps: list[int] = []
        """The optimizer steps of the records in the series."""
        self.statistics: dict[str, dict[str, OverRun]] = {}
        """By quantity and layer, over all records."""
        self._series: dict[str, dict[str, array[float]]] = {quantity: {} for quantity in _DRAWN}
        self._seen = 0
        self._every = 1
        self._position: dict[str, int] = {}

    def set_order(self, layers: Iterable[str]) -> None:
        """Set the order of the layers in the network; others come last, in order of appearance."""
        self._position = {layer: i for i, layer in enumerate(layers)}

    def record(self, step: int, quantities: Mapping[str, Mapping[str, OverSteps]]) -> None:
        """Add statistics from ``StepStatistics.flush``; layers that are not in them have no value."""
        for quantity, layers in quantities.items():
            statistics = self.statistics.setdefault(quantity, {})
            for layer, value in layers.items():
                statistics.setdefault(layer, OverRun()).add(value)
        if self._seen % self._every == 0:
            self._append(step, quantities)
        self._seen += 1

    def series(self, quantity: str) -> dict[str, list[float]]:
        """Return the time series of each layer, in the order of the network, one value for each of ``steps``.

        Args:
            quantity: ``"trust_ratio"``, ``"effective_lr"``, or, for layers without a trust ratio,
                ``"update_to_weight"``.

        Returns:
            NaN where a layer has no value, infinity where its value is not finite.
        """
        series = self._series[quantity]
        return {layer: list(series[layer]) for layer in self.in_order(series)}

    @property
    def leading(self) -> str:
        """The quantity to compare layers by: trust ratios, or updates where there are none."""
        return "trust_ratio" if self.statistics.get("trust_ratio") else "update_to_weight"

    def in_order(self, layers: Iterable[str]) -> list[str]:
        """Return the layers in the order of the network."""
        return sorted(layers, key=lambda layer: self._position.get(layer, len(self._position)))

    def learning_rates(self) -> list[float]:
        """Return the largest learning rate of any layer at each of ``steps``, NaN where it is unknown."""
        rates = []
        ratios, effective = self._series["trust_ratio"], self._series["effective_lr"]
        known = [layer for layer in ratios if layer in effective]
        for i in range(len(self.steps)):
            of_layers = [effective[layer][i] / ratios[layer][i] for layer in known if ratios[layer][i]]
            rates.append(max((rate for rate in of_layers if math.isfinite(rate)), default=math.nan))
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Return the state, from which another instance can continue."""
        return {
            "steps": list(self.steps),
            "seen": self._seen,
            "every": self._every,
            "series": {
                quantity: {layer: list(values) for layer, values in layers.items()}
                for quantity, layers in self._series.items()
            },
            "statistics": {
                quantity: {layer: vars(value).copy() for layer, value in layers.items()}
                for quantity, layers in self.statistics.items()
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the ``state_dict()`` of another instance."""
        self.steps = list(state_dict["steps"])
        self._seen, self._every = state_dict["seen"], state_dict["every"]
        self._series = {
            quantity: {layer: array("d", values) for layer, values in layers.items()}
            for quantity in _DRAWN
            for layers in [state_dict["series"].get(quantity, {})]
        }
        self.statistics = {
            quantity: {layer: OverRun(**value) for layer, value in layers.items()}
            for quantity, layers in state_dict["statistics"].items()
        }
        # The other instance may have kept more records.
        while len(self.steps) > self.max_records:
            self._thin()

    def _append(self, step: int, quantities: Mapping[str, Mapping[str, OverSteps]]) -> None:
        if len(self.steps) == self.max_records:
            self._thin()
        before = len(self.steps)
        self.steps.append(step)
        for quantity, series in self._series.items():
            layers = quantities.get(quantity, {})
            if quantity == "update_to_weight":
                ratios = quantities.get("trust_ratio", {})
                layers = {layer: value for layer, value in layers.items() if layer not in ratios}
            for layer in layers:
                if layer not in series:
                    series[layer] = array("d", [math.nan] * before)
            for layer, values in series.items():
                value = layers[layer].mean if layer in layers else math.nan
                values.append(math.inf if layer in layers and not math.isfinite(value) else value)

    def _thin(self) -> None:
        self.steps = self.steps[::2]
        self._series = {
            quantity: {layer: values[::2] for layer, values in layers.items()}
            for quantity, layers in self._series.items()
        }
        self._every *= 2
