"""Statistics of what an optimizer did to every layer, since they were last flushed."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lars.optim.last_trust_ratios import StackedTrustRatios
from lightning_lars.optim.parameters import named_params
from lightning_lars.trust_ratios.layer_names import names_by_number
from lightning_lars.trust_ratios.layer_statistics import LayerStatistics, OverSteps
from lightning_lars.trust_ratios.peak_rate import Peak, PeakRate, largest
from lightning_lars.trust_ratios.protocols import FLAGS, HasTrustRatios, StacksTrustRatios
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
        self._statistics = LayerStatistics()
        self._of_step: list[tuple[str, list[str], Tensor]] = []
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
        labels = self._statistics.labels
        if not labels:
            return {}
        table, peak = self._statistics.compute(), self._peak.state()
        values = torch.cat([table.T.flatten(), peak.to(table)]).cpu()
        self._statistics.reset()
        rows = values[: -len(peak)].view(len(labels), -1).tolist()
        flushed: dict[str, dict[str, OverSteps]] = {}
        for (quantity, layer), row in zip(labels, rows, strict=True):
            flushed.setdefault(quantity, {})[layer] = OverSteps(*row)
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
        optimizer = self._optimizer
        has_stepped = True
        if isinstance(optimizer, StacksTrustRatios):
            stacked = optimizer.stacked_trust_ratios()
            if stacked is not None:
                self._add_stacked(stacked)
            has_stepped = stacked is not None
        elif isinstance(optimizer, HasTrustRatios):
            ratios = optimizer.trust_ratios()
            if ratios:
                self._add_ratios(ratios)
            has_stepped = bool(ratios)
        elif self._norms.params:
            self._add_updates()
        self.has_stepped = self.has_stepped or has_stepped
        self._norms.discard()
        self._add_step()

    def _add_updates(self) -> None:
        """Add the updates of an optimizer without trust ratios, in a step that is measured."""
        named = self._named_params()
        # The same layers on all ranks, which may have no gradient of an empty shard.
        trained = {p for p in self._norms.params if p.requires_grad}
        layers = [name for name, p in named.items() if p in trained]
        rate = self._add_norms(layers, named).descent_rate()
        if rate is not None:
            self._add("effective_lr", layers, rate)

    def _add_stacked(self, stacked: StackedTrustRatios) -> None:
        """Add the trust ratios of a step, the quantities that depend on them, and the updates."""
        named = self._named_params()
        layers, ratio = stacked.layers, stacked.trust_ratio
        self._add("trust_ratio", layers, ratio)
        for quantity in FLAGS:
            self._add(quantity, layers, getattr(stacked, quantity).to(ratio))
        number = self._group_numbers(named)
        effective_lr = _times(self._lr, [number[layer] for layer in layers], ratio)
        self._add("effective_lr", layers, effective_lr)
        lr_from_zero = effective_lr.where(stacked.from_zero, 0.0)
        self._add("lr_from_zero", layers, lr_from_zero)
        if not self._known.issuperset(layers):
            self._known.update(layers)
            self._first_steps.append((layers, lr_from_zero))
        decays = [_decay(group) for group in self._optimizer.param_groups]
        decay = _times(decays, [number[layer] for layer in layers], effective_lr)
        self._add("lost_to_decay", layers, decay.where(stacked.by_decay_alone, 0.0))
        if self._norms.params:
            # In the order of the parameters, which is the same on all ranks.
            has_ratio = set(layers)
            self._add_norms([name for name in named if name in has_ratio], named)

    def _add_ratios(self, ratios: Mapping[str, Tensor]) -> None:
        """Add the trust ratios of a step of an optimizer that reports them for one layer at a time."""
        named = self._named_params()
        layers = list(ratios)
        ratio = _stack(ratios)
        self._add("trust_ratio", layers, ratio)
        for quantity in FLAGS:
            flags: dict[str, Tensor] = getattr(self._optimizer, quantity, dict)()
            if flags:
                self._add(quantity, list(flags), _stack(flags).to(ratio))
        if ratios.keys() <= named.keys():
            number = self._group_numbers(named)
            self._add("effective_lr", layers, _times(self._lr, [number[layer] for layer in layers], ratio))
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
        self._of_step.append((quantity, layers, values))

    def _add_step(self) -> None:
        """Add all quantities of a step to the statistics at once."""
        of_step, self._of_step = self._of_step, []
        if of_step:
            name = self._by_number.get
            labels = [(quantity, name(layer, layer)) for quantity, layers, _ in of_step for layer in layers]
            first = of_step[0][2]
            # Norms are in float64 where their device has it, which that of the ratios may not.
            dtype = torch.promote_types(first.dtype, torch.float32)
            values = [values.to(first.device, dtype) for _, _, values in of_step]
            self._statistics.update(labels, torch.cat(values))

    def _group_numbers(self, named: Mapping[str, Tensor]) -> dict[str, int]:
        sizes = [len(group["params"]) for group in self._optimizer.param_groups]
        numbers = chain.from_iterable([number] * size for number, size in enumerate(sizes))
        return dict(zip(named, numbers, strict=True))


def _times(factors: Sequence[Any], groups: Sequence[int], values: Tensor) -> Tensor:
    """Multiply the value of each layer by the factor of its group."""
    # Layers of a group are consecutive: one product for each group, not for each layer.
    runs = [(group, len(list(run))) for group, run in groupby(groups)]
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
