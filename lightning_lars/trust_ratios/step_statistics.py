"""Statistics of what an optimizer did to every layer, since they were last flushed."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lars.optim.parameters import named_params
from lightning_lars.sharding.norms import widest_float
from lightning_lars.trust_ratios.layer_names import names_by_number
from lightning_lars.trust_ratios.layer_statistics import LayerStatistics, OverSteps
from lightning_lars.trust_ratios.peak_rate import Peak, PeakRate, largest
from lightning_lars.trust_ratios.protocols import FLAGS, HasTrustRatios, ReportsCauses
from lightning_lars.trust_ratios.step_norms import Norms, StepNorms

FOR_ALERTS = ("lr_from_zero", "lost_to_decay")
"""Quantities that are only used for warnings, not for logs or the history."""


class StepStatistics:
    """Accumulates statistics on the device, in hooks around ``optimizer.step()``, until they are flushed.

    Args:
        optimizer: Any optimizer. ``trust_ratios()`` and the methods in ``FLAGS`` are used where it has them.
        is_measured: Called before each step; whether to measure its updates and gradients. Must return the
            same on all ranks.
        names: Names of parameters, for layers that are unnamed in the optimizer.
        updates: Whether updates are measured, which takes a copy of the weights.
        gradients: Whether gradients are measured.
    """

    def __init__(
        self,
        optimizer: Optimizer | HasTrustRatios,
        is_measured: Callable[[], bool],
        names: Mapping[Tensor, str] | None = None,
        *,
        updates: bool = True,
        gradients: bool = False,
    ) -> None:
        self._optimizer = optimizer
        self._norms = StepNorms(is_measured, updates=updates, gradients=gradients)
        self._names = names or {}
        self._by_number: dict[str, str] = {}
        self._quantities: dict[str, LayerStatistics] = {}
        self.has_stepped = False
        """Whether there was a step, of an optimizer with trust ratios one that had any, since this was set to
        False."""
        self.peak: Peak | None = None
        """Peak of ``trust_coefficient * lr`` up to the last non-empty :meth:`flush`.

        Excludes groups with ``trust_clip="larc"``, which move by ``trust_coefficient`` at any learning rate.
        """
        self._peak = PeakRate()
        self._lr: list[Any] = []
        self._known: set[str] = set()
        self._first_steps: list[tuple[list[str], Tensor]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Remove the hooks from the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def flush_first_steps(self) -> dict[str, float]:
        """Return ``lr_from_zero`` of steps since the last call that were the first of any layer.

        Takes a separate device-to-host copy, but only after such steps.
        """
        first_steps, self._first_steps = self._first_steps, []
        found: dict[str, float] = {}
        for layers, lr_from_zero in first_steps:
            for layer, lr in zip(layers, lr_from_zero.tolist(), strict=True):
                name = self._by_number.get(layer, layer)
                found[name] = max(lr, found.get(name, 0.0))
        return found

    def plain_rate(self) -> float:
        """Return ``trust_coefficient * lr`` with the schedulers' initial rates, outside of steps."""
        return max(
            (
                float(max(group.get("initial_lr", 0.0), group["lr"])) * group["trust_coefficient"]
                for group in self._optimizer.param_groups
                if _moves_by_lr(group)
            ),
            default=0.0,
        )

    def flush(self) -> dict[str, dict[str, OverSteps]]:
        """Return the accumulated statistics, in one device-to-host copy, and start over.

        Returns:
            ``trust_ratio``, ``effective_lr`` (learning rate times trust ratio; without trust ratios,
            ``|change of w| / |g|``, 0 where either is 0), where they were measured ``update_to_weight``
            (``|change of w| / |w after it|``) and ``gradient_norm``, and, where the optimizer reports them,
            ``FLAGS`` (0 or 1), ``lr_from_zero`` (the effective learning rate of a step from zero weights,
            else 0) and ``lost_to_decay`` (the fraction of its norm that decay removed from a layer in a step,
            before momentum, if decay alone moved it, else 0).
        """
        quantities, self._quantities = self._quantities, {}
        if not quantities:
            return {}
        tables = [statistics.compute() for statistics in quantities.values()]
        device = tables[0].device
        is_wide = any(table.dtype == torch.float64 for table in tables)
        dtype = widest_float(device) if is_wide else torch.float32
        columns = [table.T.flatten().to(device, dtype) for table in tables]
        peak = self._peak.state()
        values = torch.cat([*columns, peak.to(device, dtype)]).cpu()
        rows = iter(values[: -len(peak)].view(-1, len(tables[0])).tolist())
        flushed = {
            quantity: {layer: OverSteps(*next(rows)) for layer in statistics.layers}
            for quantity, statistics in quantities.items()
        }
        self.peak = self._peak.read(values[-len(peak) :].tolist())
        return flushed

    def _before_step(self, *_: Any) -> None:
        # By now, the learning rate has been adjusted for the step, and will be restored before the next hook.
        groups = self._optimizer.param_groups
        self._lr = [
            group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"] for group in groups
        ]
        pairs = zip(self._lr, groups, strict=True)
        scaled = [lr * group["trust_coefficient"] for lr, group in pairs if _moves_by_lr(group)]
        if scaled:
            self._peak.update(largest(scaled))
        self._norms.before_step(groups)

    def _after_step(self, *_: Any) -> None:
        ratios = self._optimizer.trust_ratios() if isinstance(self._optimizer, HasTrustRatios) else None
        if ratios:
            self._add_ratios(ratios)
        elif ratios is None and self._norms.params:
            self._add_updates()
        if ratios is None or ratios:
            self.has_stepped = True
        self._norms.discard()

    def _add_updates(self) -> None:
        """Add the updates of an optimizer without trust ratios, in a step that is measured."""
        named = self._named_params()
        # The same layers on all ranks, which may have no gradient of an empty shard.
        trained = {p for p in self._norms.params if p.requires_grad}
        layers = [name for name, p in named.items() if p in trained]
        rate = self._add_norms(layers, named).descent_rate()
        if rate is not None:
            self._add("effective_lr", layers, rate)

    def _add_ratios(self, ratios: Mapping[str, Tensor]) -> None:
        """Add the trust ratios of a step, the quantities that depend on them, and the updates."""
        named = self._named_params()
        layers = list(ratios)
        ratio = _stack(ratios)
        self._add("trust_ratio", layers, ratio)
        for quantity in FLAGS:
            flags: dict[str, Tensor] = getattr(self._optimizer, quantity, dict)()
            if flags:
                self._add(quantity, list(flags), _stack(flags).to(ratio))
        if not ratios.keys() <= named.keys():
            return
        effective_lr = self._times(self._lr, layers, ratio, named)
        self._add("effective_lr", layers, effective_lr)
        if isinstance(self._optimizer, ReportsCauses):
            lr_from_zero = effective_lr.where(_stack(self._optimizer.from_zero()), 0.0)
            self._add("lr_from_zero", layers, lr_from_zero)
            if not self._known.issuperset(layers):
                self._known.update(layers)
                self._first_steps.append((layers, lr_from_zero))
            decays = [_decay(group) for group in self._optimizer.param_groups]
            decay = self._times(decays, layers, effective_lr, named)
            self._add("lost_to_decay", layers, decay.where(_stack(self._optimizer.by_decay_alone()), 0.0))
        self._add_norms(layers, named)

    def _named_params(self) -> dict[str, Tensor]:
        named = dict(named_params(self._optimizer.param_groups))
        self._by_number = names_by_number(named, self._names)
        return named

    def _add_norms(self, layers: list[str], named: Mapping[str, Tensor]) -> Norms:
        norms = self._norms.after_step(layers, [named[layer] for layer in layers])
        update_to_weight = norms.update_to_weight()
        if update_to_weight is not None:
            self._add("update_to_weight", layers, update_to_weight)
        if norms.gradients is not None:
            self._add("gradient_norm", layers, norms.gradients)
        return norms

    def _add(self, quantity: str, layers: list[str], values: Tensor) -> None:
        layers = [self._by_number.get(layer, layer) for layer in layers]
        # Creating a metric takes longer than all that a step adds to it.
        if quantity not in self._quantities:
            self._quantities[quantity] = LayerStatistics()
        self._quantities[quantity].update(layers, values)

    def _times(
        self, factors: Sequence[Any], layers: list[str], values: Tensor, named: Mapping[str, Tensor]
    ) -> Tensor:
        """Multiply the value of each layer by the factor of its group."""
        number = {p: i for i, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        # Layers of a group are consecutive: one product for each group, not for each layer.
        runs = [(group, len(list(run))) for group, run in groupby(number[named[layer]] for layer in layers)]
        parts = torch.split(values, [length for _, length in runs])
        return torch.cat([part * factors[group] for (group, _), part in zip(runs, parts, strict=True)])


def _moves_by_lr(group: Mapping[str, Any]) -> bool:
    """Return whether ``trust_coefficient * lr`` determines how far the layers of a group move."""
    is_scaled = group.get("layer_adaptation", True) and "trust_coefficient" in group
    return is_scaled and group.get("trust_clip") != "larc"


def _decay(group: Mapping[str, Any]) -> float:
    """Return the decay of a layer, relative to its norm, at an effective learning rate of 1."""
    decay: float = group["weight_decay"]
    if group.get("denominator") == "momentum":
        # The ratio scales v', which has accumulated the decay of several steps.
        decay *= (1 - group["dampening"]) / (1 - group["momentum"])
    return decay


def _stack(values: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(values.values()))
    return torch.stack([value.to(first, non_blocking=True) for value in values.values()])
