"""The order of a step: measure each batch, all-reduce the norms of sharded layers, adapt, move."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

from torch import Tensor

from lightning_lars.optim.algorithm import Algorithm, Hyperparameters
from lightning_lars.optim.backends.eager import Eager
from lightning_lars.optim.backends.scratch import Scratch
from lightning_lars.optim.backends.selection import select_backend
from lightning_lars.optim.backends.triton_table import LayerTables, is_capturing
from lightning_lars.optim.batches import Batch, Shards, divide, sort_layers
from lightning_lars.optim.distributed_norms import (
    Norms,
    gradient_scale,
    is_updated_elsewhere,
    stack_norms,
    start_exchange,
)
from lightning_lars.optim.plan import Plan, Unchanged
from lightning_lars.optim.state.plain import PlainState, States
from lightning_lars.optim.step_ratios import StepRatios
from lightning_lars.optim.trust_ratio import TrustRatios


class Step:
    """One step of an optimizer.

    Args:
        algorithm: The algorithm whose equations it evaluates.
        groups: The parameter groups of the optimizer.
        hyperparameters: The hyperparameters of each group.
        states: The state of each layer, by parameter.
        state: How the state is stored between steps.
        shards: How each parameter is sharded.
        scratch: Memory that the batches use one after the other.
        tables: The address tables of the last step.
        name: Returns the name of a parameter, for errors.
        plan: What an earlier step found, which still holds for ``found``; None if nothing does.
        found: The layers of the plan, unchanged since.
    """

    def __init__(
        self,
        algorithm: type[Algorithm],
        groups: Sequence[dict[str, Any]],
        hyperparameters: Sequence[Hyperparameters],
        states: States,
        state: PlainState,
        shards: Shards,
        scratch: Scratch,
        tables: LayerTables,
        name: Callable[[Tensor], str],
        plan: Plan | None = None,
        found: Unchanged | None = None,
    ) -> None:
        self.plan, self.found = plan, found
        self.algorithm, self.groups, self.states, self.state = algorithm, groups, states, state
        self.shards, self.scratch, self.tables, self.name = shards, scratch, tables, name
        self.hyperparameters = hyperparameters
        self.is_sharded = any(shards.values())
        self.batches: list[Batch] = []
        self._taken: list[Eager] = []
        self.ratios = StepRatios(algorithm, states)

    def take(self) -> None:
        """Update the layers that have a gradient.

        Raises:
            RuntimeError: If a layer cannot be updated; no layer has been updated then.
        """
        backends = self._begin()
        waiting: list[tuple[Eager, Norms]] = []
        for backend in backends:
            if _exchanges_norms(backend.batch):
                with self._unpacked_throughout(backend):
                    waiting.append((backend, self._measure(backend)))
                self.scratch.release()
        # Meanwhile the others are moved, which need no norm of another rank.
        exchange = self._start_exchange(waiting) if self.is_sharded else None
        for backend in backends:
            if not _exchanges_norms(backend.batch):
                with self._unpacked_throughout(backend):
                    self._move(backend, self._measure(backend))
                if backend.can_repeat:
                    self._taken.append(backend)
        self.scratch.recycle()
        if exchange is not None:
            self._move_sharded([backend for backend, _ in waiting], exchange())
        if self.plan is None and self._can_repeat():
            self.plan = Plan(self.groups, self.hyperparameters, self.states, self.state, self._taken)
        for backend in self._taken:
            backend.end()

    def _begin(self) -> Sequence[Eager]:
        """Return the back end of each batch, at the beginning of the step."""
        if self.plan is not None and self.found is not None:
            self.batches = self.plan.batches(self.found)
            backends = self.plan.begin(self.batches, self.found)
        else:
            backends = self._choose_backends()
        bound = self.groups[0]["max_grad_norm"]
        scale = gradient_scale(backends, bound, params_of(self.groups), self.shards)
        if scale is not None:
            for backend in backends:
                backend.scale_gradients(scale)
        return backends

    def _choose_backends(self) -> Sequence[Eager]:
        """Sort the layers into batches, and return a back end for each."""
        pairs = zip(self.groups, self.hyperparameters, strict=True)
        batches = [batch for group, h in pairs for batch in self._sort(group, h)]
        self.batches, chosen = [], []
        for batch in batches:
            backend = select_backend(batch, self.algorithm, self.state, self.name)
            if not backend.holds_moments:
                batch = batch._replace(in_eight_bit=False)
            parts = divide(batch, in_kernel=backend.holds_moments)
            self.batches += parts
            chosen += [backend] * len(parts)
        self.tables.start_step()
        return [
            backend_class(
                self.algorithm,
                batch,
                self.state.of_batch(self.states, batch, self.algorithm),
                self.scratch,
                self.tables,
            )
            for batch, backend_class in zip(self.batches, chosen, strict=True)
        ]

    def _can_repeat(self) -> bool:
        """Return whether the back ends of this step can repeat it."""
        is_whole = len(self._taken) == len(self.batches) > 0 and not any(self.shards.values())
        return (
            is_whole
            and not any(batch.is_first for batch in self.batches)
            and all(backend.state.can_repeat() for backend in self._taken)
            and not any(is_capturing(batch.weights[0].device) for batch in self.batches)
        )

    def _sort(self, group: dict[str, Any], h: Hyperparameters) -> Iterable[Batch]:
        adapts_direction = group["layer_adaptation"] and self.algorithm.adapts_direction(h)
        is_first = self.state.first_step_test(self.algorithm.used_moments(h))
        shards = self.shards if self.is_sharded else {}
        batches = sort_layers(group, h, adapts_direction, self.states, shards, is_first, self.name)
        if group["fused"] is False:
            return batches
        moments = self.algorithm.used_moments(h)
        return chain.from_iterable(self.state.split(batch, moments) for batch in batches)

    def _unpacked_throughout(self, backend: Eager) -> AbstractContextManager[None]:
        """Hold the moments of a batch in float32 or wider, if its back end needs them in both phases."""
        # In the layers of a plan, nothing needs to be unpacked.
        opens = backend.holds_moments and not backend.batch.in_eight_bit and self.found is None
        return self.state.unpacked(self.states, backend.batch) if opens else nullcontext()

    def _measure(self, backend: Eager) -> Any:
        with self._unpacked(backend, backend.batch.adapts_direction):
            return backend.measure()

    def _unpacked(self, backend: Eager, opens: bool) -> AbstractContextManager[None]:
        """Hold the moments of a batch in float32 or wider during measure() or move(), if it uses them."""
        opens = opens and not backend.holds_moments
        return self.state.unpacked(self.states, backend.batch) if opens else nullcontext()

    def _move(self, backend: Eager, norms: Norms | TrustRatios[Tensor] | None) -> None:
        """Update the layers of a batch from the norms of whole layers, or from their trust ratios."""
        batch = backend.batch
        with self._unpacked(backend, not batch.adapts_direction):
            if norms is None:
                backend.move(None)
            elif isinstance(norms, TrustRatios):
                backend.move(self.ratios.record(batch.params, norms))
            elif backend.in_floats:
                backend.move(self.ratios.in_floats(batch.params, norms, float(backend.lr), batch.h))
            else:
                backend.move(self.ratios.from_norms(batch.params, norms, backend.lr, batch.h))
        if batch.in_eight_bit and self.found is None:
            backend.state.end_step()

    def _start_exchange(self, waiting: Sequence[tuple[Eager, Norms]]) -> Callable[[], dict[Tensor, Norms]]:
        """Begin the all-reduce of the norms of all sharded layers."""
        local_norms = [(backend.batch, norms) for backend, norms in waiting]
        return start_exchange(local_norms, params_of(self._adapted_groups), self.shards)

    @property
    def _adapted_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.groups if group["layer_adaptation"]]

    def _move_sharded(self, backends: Sequence[Eager], norms: dict[Tensor, Norms]) -> None:
        """Update all sharded layers from the norms of whole layers."""
        for backend in backends:
            batch = backend.batch
            self._move(backend, stack_norms(batch.params, norms, batch.weights[0].device))
        for group, h in zip(self.groups, self.hyperparameters, strict=True):
            if not group["layer_adaptation"]:
                continue
            # This rank has no shard of these layers to update, but all ranks report their trust ratios.
            elsewhere = [p for p in group["params"] if is_updated_elsewhere(p, self.shards)]
            if elsewhere:
                own = stack_norms(elsewhere, norms, elsewhere[0].device)
                self.ratios.from_norms(elsewhere, own, group["lr"], h)


def _exchanges_norms(batch: Batch) -> bool:
    """Return whether the trust ratios of a batch need norms of other ranks."""
    return batch.is_sharded and bool(batch.group["layer_adaptation"])


def exchanging_groups(groups: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Return the groups of which sharded layers need an exchange of norms."""
    return [g for g in groups if g["layer_adaptation"] or g["max_grad_norm"] is not None]


def params_of(groups: Iterable[Mapping[str, Any]]) -> Iterable[Tensor]:
    """Return the parameters of all groups."""
    return chain.from_iterable(group["params"] for group in groups)
