"""The data of a finished run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Points = dict[int, float]
"""Values by step, in ascending order."""


@dataclass(frozen=True)
class Group:
    """A parameter group, as text."""

    optimizer: str
    name: str
    tensors: str
    elements: str
    lr: str
    weight_decay: str
    layer_adaptation: str


@dataclass(frozen=True)
class Run:
    """The data of a run, from one source or several."""

    metrics: dict[str, Points] = field(default_factory=dict)
    """Logged numbers, by key."""
    layers: dict[str, dict[str, Points]] = field(default_factory=dict)
    """Logged numbers of each layer, by quantity, such as ``trust_ratio``, and name."""
    groups: tuple[Group, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    """Hyperparameters, versions and progress."""
    alerts: tuple[str, ...] = ()
    """Warnings that were given during training."""

    def merged(self, other: "Run") -> "Run":
        """Return the data of both; ``other`` takes precedence, also in the order of layers.

        Of the two series of a layer, the longer one is kept: a checkpoint holds fewer steps than a log, and
        counts them from 1.
        """
        return Run(
            metrics={**self.metrics, **other.metrics},
            layers={
                quantity: _in_order(self.layers.get(quantity, {}), other.layers.get(quantity, {}))
                for quantity in {**self.layers, **other.layers}
            },
            groups=other.groups or self.groups,
            settings={**self.settings, **other.settings},
            alerts=(*self.alerts, *other.alerts),
        )


def _in_order(first: Mapping[str, Points], second: Mapping[str, Points]) -> dict[str, Points]:
    """Return the layers in the order of the second, then those of the first that it does not have."""
    names = [*second, *(name for name in first if name not in second)]
    return {name: max(first.get(name, {}), second.get(name, {}), key=len) for name in names}
