"""Norms of updates and gradients, measured around some of an optimizer's steps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lars.gradients.norms import gradient_norms
from lightning_lars.sharding.shards import find_shards, local
from lightning_lars.trust_ratios.update_norms import update_norms


class Norms(NamedTuple):
    """Norms of some layers in one step, of shape ``(layers,)``; None if not measured."""

    change: Tensor | None = None
    """The norm of the change of the weights."""

    weights: Tensor | None = None
    """The norm of the weights after the step."""

    gradients: Tensor | None = None

    def update_to_weight(self) -> Tensor | None:
        """Return ``|change of w| / |w|``."""
        if self.change is None or self.weights is None:
            return None
        return torch.where(self.change == 0, 0.0, self.change / self.weights)

    def descent_rate(self) -> Tensor | None:
        """Return the learning rate at which gradient descent makes a step as long: ``|change of w| / |g|``.

        0 where either norm is 0.
        """
        change, gradients = self.change, self.gradients
        if change is None or gradients is None:
            return None
        has_rate = (change != 0) & (gradients != 0)
        return torch.where(has_rate, change / gradients, 0.0)


class StepNorms:
    """Measures by how much a step moves the adapted layers, and with which gradients.

    Args:
        is_measured: Called before each step; whether to measure it. Must return the same on all ranks.
        updates: Whether updates are measured, which takes a copy of the weights.
        gradients: Whether gradients are measured.
    """

    def __init__(self, is_measured: Callable[[], bool], *, updates: bool, gradients: bool) -> None:
        self._is_measured = is_measured
        self._updates, self._gradients = updates, gradients
        self._before: dict[Tensor, Tensor] = {}
        self.params: list[Tensor] = []
        """The adapted parameters, in a step that is measured."""

    def before_step(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Decide whether to measure the step, and copy the weights if it needs them."""
        self.discard()
        if (self._updates or self._gradients) and self._is_measured():
            adapted = [group["params"] for group in groups if group.get("layer_adaptation", True)]
            self.params = [p for params in adapted for p in params]
        if self._updates:
            with torch.no_grad():
                self._before = {p: local(p).clone() for p in self.params}

    def after_step(self, layers: Sequence[str], params: Sequence[Tensor]) -> Norms:
        """Return the norms of layers, given by the same names and parameters on all ranks."""
        if not layers or not self.params:
            return Norms()
        shards = find_shards(zip(layers, params, strict=True))
        change = weights = gradients = None
        if self._updates:
            change, weights = update_norms(params, self._before, shards)
        if self._gradients:
            # Only now, because the closure may have computed them, and a scaler unscaled them, in the step.
            gradients = gradient_norms(params, shards, params[0].device)
        return Norms(change, weights, gradients)

    def discard(self) -> None:
        """Release the copies of the weights."""
        self.params, self._before = [], {}
