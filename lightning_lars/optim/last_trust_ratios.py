"""The trust ratios of the last step, and what determined them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Algorithm
from lightning_lars.optim.backends.eager import dtype_of_step
from lightning_lars.optim.parameters import named_params
from lightning_lars.optim.step_ratios import Ratios
from lightning_lars.optim.trust_ratio import (
    TrustRatios,
    at_clip,
    at_zero_rule,
    by_decay_alone,
    from_zero,
    stack_ratios,
)


class StackedTrustRatios(NamedTuple):
    """The trust ratios of the last step as vectors over its adapted layers, on the first one's device."""

    layers: list[str]
    """As :meth:`LastTrustRatios.trust_ratios` names them, in the order in which the step visited them."""

    trust_ratio: Tensor
    at_trust_clip: Tensor
    at_zero_rule: Tensor
    from_zero: Tensor
    by_decay_alone: Tensor


class LastTrustRatios:
    """The methods of an optimizer that report on the trust ratios of its last step."""

    param_groups: list[dict[str, Any]]

    # The adapted layers of each batch in the last step, and their trust ratios.
    _last_trust_ratios: list[tuple[list[Tensor], Ratios]]

    def trust_ratios(self) -> dict[str, Tensor]:
        """Return the trust ratio that the last step used for each adapted layer.

        Returns:
            0-d tensors on the device of their layer, by parameter name, or by the parameter's number in
            ``state_dict()`` where the optimizer was built without names. Empty before the first step
            and after a state dict was loaded.
        """
        return self._by_name(lambda ratios, _: ratios.ratio)

    def at_trust_clip(self) -> dict[str, Tensor]:
        """Return for each adapted layer whether ``trust_clip`` changed its ratio in the last step.

        Returns:
            0-d bool tensors, as :meth:`trust_ratios` returns them.
        """
        return self._by_name(lambda ratios, _: at_clip(ratios))

    def at_zero_rule(self) -> dict[str, Tensor]:
        """Return for each adapted layer whether its ratio was 1 because a norm was 0 in the last step.

        Returns:
            0-d bool tensors, as :meth:`trust_ratios` returns them.
        """
        return self._by_name(lambda ratios, _: at_zero_rule(ratios))

    def from_zero(self) -> dict[str, Tensor]:
        """Return for each adapted layer whether the last step updated it from weights that were all 0.

        The ratio of such a step is 1 before clipping: it is a step of SGD (LARS) or Adam (LAMB).

        Returns:
            0-d bool tensors, as :meth:`trust_ratios` returns them.
        """
        return self._by_name(lambda ratios, _: from_zero(ratios))

    def by_decay_alone(self) -> dict[str, Tensor]:
        """Return for each adapted layer whether only weight decay contributed to its last step.

        This happens with a gradient of 0 if the decay is part of the adapted update. The trust ratio makes
        such a step as long as any other, however small the decay is.

        Returns:
            0-d bool tensors, as :meth:`trust_ratios` returns them.
        """
        group_of = self._group_of_each()
        return self._by_name(lambda ratios, params: self._by_decay_alone(ratios, params, group_of))

    def stacked_trust_ratios(self) -> StackedTrustRatios | None:
        """Return the results of the methods above as vectors, without an operation for each layer.

        Returns:
            None before the first step and after a state dict was loaded.
        """
        names = {id(p): name for name, p in named_params(self.param_groups)}
        group_of = self._group_of_each()
        layers: list[str] = []
        columns: list[tuple[Tensor, ...]] = []
        for params, ratios in self._stacked():
            of_batch = [names.get(id(p)) for p in params]
            rows = [row for row, name in enumerate(of_batch) if name is not None]
            layers += [name for name in of_batch if name is not None]
            alone = self._by_decay_alone(ratios, params, group_of)
            values = (ratios.ratio, at_clip(ratios), at_zero_rule(ratios), from_zero(ratios), alone)
            # Without parameters that were removed from the optimizer since.
            columns.append(values if len(rows) == len(params) else tuple(value[rows] for value in values))
        if not layers:
            return None
        device = columns[0][0].device
        return StackedTrustRatios(
            layers,
            *(
                torch.cat([part.to(device, non_blocking=True) for part in parts])
                for parts in zip(*columns, strict=True)
            ),
        )

    def _group_of_each(self) -> dict[int, dict[str, Any]]:
        return {id(p): group for group in self.param_groups for p in group["params"]}

    def _by_decay_alone(
        self, ratios: TrustRatios[Tensor], params: list[Tensor], group_of: dict[int, dict[str, Any]]
    ) -> Tensor:
        # The layers of a batch are in one group, unless they were removed from it since.
        group = next((group_of[id(p)] for p in params if id(p) in group_of), None)
        if group is None:
            return by_decay_alone(ratios, (0.0, 0.0))
        assert isinstance(self, Algorithm)
        return by_decay_alone(ratios, self.decay_only_bounds(self.hyperparameters(group)))

    def _by_name(self, value: Callable[[TrustRatios[Tensor], list[Tensor]], Tensor]) -> dict[str, Tensor]:
        values: dict[int, Tensor] = {}
        for params, ratios in self._stacked():
            values.update(zip(map(id, params), value(ratios, params).unbind(), strict=True))
        return {name: values[id(p)] for name, p in named_params(self.param_groups) if id(p) in values}

    def _stacked(self) -> Iterator[tuple[list[Tensor], TrustRatios[Tensor]]]:
        for params, ratios in self._last_trust_ratios:
            if isinstance(ratios, list):
                yield params, stack_ratios(ratios, dtype_of_step(params[0]))
            else:
                yield params, TrustRatios(*ratios)
