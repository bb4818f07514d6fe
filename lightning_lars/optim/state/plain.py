"""State stored in plain tensors."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Algorithm
from lightning_lars.optim.backends.choice import match_layout
from lightning_lars.optim.batches import Batch
from lightning_lars.optim.state.code_table import CodeTable
from lightning_lars.optim.state.torchao import to_float
from lightning_lars.rules import Rule
from lightning_lars.sharding.shards import laid_out_as, local

States = MutableMapping[Any, dict[str, Any]]
"""The state of the optimizer, by parameter, as in ``torch.optim``."""


_NO_CONTEXT = nullcontext()


class PlainState:
    """Stores each moment between steps in a tensor of float32 or wider."""

    rules: Mapping[str, Rule] = {}
    """Rules for hyperparameters that only this kind of state has."""

    defaults: Mapping[str, Any] = {}
    """Default values of these hyperparameters."""

    def __init__(self) -> None:
        # The layers whose state is left from a dry run, and whose first step is still to come.
        self._dry_run: set[Tensor] = set()

    def fresh(self) -> "PlainState":
        """Return a new object for state that was loaded."""
        return PlainState()

    def check(self, shards: Mapping[str, Any]) -> None:
        """Raise RuntimeError if one of these shards, given by name, is not supported."""

    def split(self, batch: Batch, moments: Sequence[str]) -> Iterable[Batch]:
        """Split a batch into layers whose moments a kernel reads in 8 bits, and those to unpack."""
        return [batch]

    def of_batch(self, states: States, batch: Batch, algorithm: type[Algorithm]) -> "BatchState":
        """Return the state of the layers of a batch."""
        return BatchState(states, batch, algorithm)

    def why_not_in_triton(self, batch: Batch) -> str | None:
        """Return why the Triton kernel does not support this state, None if it does."""
        return None

    def tensors(self, states: Iterable[Mapping[str, Any]]) -> list[Tensor]:
        """Return the plain tensors in the state of layers that :meth:`BatchState.can_repeat` allows."""
        return list(chain.from_iterable([state.values() for state in states]))

    def first_step_test(self, moments: Sequence[str]) -> Callable[[Tensor, Any], bool]:
        """Return a function of a layer and its state: whether one of these moments is still missing."""
        dry_run = self._dry_run

        def is_first(p: Tensor, state: Mapping[str, Any] | None) -> bool:
            if state is None or (dry_run and p in dry_run):
                return bool(moments)
            for key in moments:  # noqa: SIM110, because a generator takes three times as long
                if state.get(key) is None:
                    return True
            return False

        return is_first

    def end_step(self, params: Iterable[Tensor]) -> None:
        """Record that these layers have been updated."""
        if self._dry_run:
            self._dry_run.difference_update(params)

    def keep_only(self, params: Iterable[Tensor]) -> None:
        """Forget all layers but these, which are in the groups now."""
        self._dry_run.intersection_update(params)

    def zero(self, states: States, groups: Sequence[Mapping[str, Any]]) -> None:
        """Zero the state after a dry run, keeping its structure."""
        for state in states.values():
            for value in state.values():
                value.zero_()
        self._dry_run.update(states)

    def plain_moments(self, moments: list[list[Tensor]]) -> list[list[Tensor]]:
        """Return the moments of each layer that are held in plain tensors."""
        return moments

    def unpacked(self, states: States, batch: Batch) -> AbstractContextManager[None]:
        """Provide the moments in plain tensors of float32 or wider, within a ``with`` block."""
        return _NO_CONTEXT

    def convert_loaded(self, states: States, groups: Sequence[Mapping[str, Any]]) -> None:
        """Convert state that was loaded, in any form, to the form in which it is stored here."""
        for p, state in states.items():
            to_float(state, p)

    def save(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict in which all tensors are plain."""
        return state_dict


class BatchState:
    """The state of the layers of a batch, during a step."""

    def __init__(self, states: States, batch: Batch, algorithm: type[Algorithm]) -> None:
        self.batch = batch
        self._states, self._algorithm = states, algorithm
        self._used = algorithm.used_moments(batch.h)

    def moments(self) -> list[list[Tensor] | None]:
        """Return each moment of all layers, 0 before their first step; None for a moment not in use."""
        if not self._used:
            return [None] * len(self._algorithm.moments)
        batch = self.batch
        if batch.is_first:
            batch.states[:] = [self._states[p] for p in batch.params]
            for p, w, state in zip(batch.params, batch.weights, batch.states, strict=True):
                self._initialize(p, w, state)
        return [
            [local(state[key]) for state in batch.states] if key in self._used else None
            for key in self._algorithm.moments
        ]

    def columns(self) -> list[list[Tensor]]:
        """Return the tensors of the moments in use that a kernel reads, one list of all layers for each."""
        return [moment for moment in self.moments() if moment is not None]

    def end_step(self) -> None:
        """Record that a kernel has written the moments in 8 bits."""

    def can_repeat(self) -> bool:
        """Return whether a step leaves the state in the tensors from which the next step reads it."""
        return all(type(value) is Tensor for state in self.batch.states for value in (state or {}).values())

    def code_tables(self) -> tuple[CodeTable, ...]:
        """Return the table of nearest codes of each moment in use that is stored in 8 bits."""
        return ()

    def next_steps(self) -> list[Tensor]:
        """Increment the step of each layer and return it; :meth:`moments` must have been called."""
        steps = self.steps()
        torch._foreach_add_(steps, 1.0)
        return steps

    def steps(self) -> list[Tensor]:
        """Return how many steps each layer has taken; call :meth:`moments` first."""
        return [state["step"] for state in self.batch.states]

    def _initialize(self, p: Tensor, w: Tensor, state: dict[str, Any]) -> None:
        if self._algorithm.counts_steps and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=w.device)
        if self._algorithm.norm_moment is not None:
            number_of(self._states, p, self._algorithm.norm_moment)
        for key in self._used:
            if state.get(key) is None:
                state[key] = laid_out_as(p, self._zeros(key, w))

    def _zeros(self, key: str, w: Tensor) -> Tensor:
        return torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))


def number_of(states: States, p: Tensor, key: str) -> Tensor:
    """Return the 0-d state tensor of a layer under this key, 0 at first."""
    state = states[p]
    if state.get(key) is None:
        dtype = torch.promote_types(p.dtype, torch.float32)
        state[key] = torch.zeros((), dtype=dtype, device=p.device)
    number: Tensor = state[key]
    return number


def checked_moments(
    batch: Batch, algorithm: type[Algorithm], name: Callable[[Tensor], str]
) -> list[list[Tensor]]:
    """Return the local shards of the moments of each layer, in the memory layout of the layer.

    That layout may have changed since the last step (``channels_last``): the state is then copied.

    Raises:
        RuntimeError: If the state has another device or shape than its layer, or lacks the number of steps.
    """
    device = batch.weights[0].device
    moments = []
    for p, w, state in zip(batch.params, batch.weights, batch.states, strict=True):
        own: list[Tensor] = []
        moments.append(own)
        if not state:
            continue
        shape, is_contiguous = w.shape, w.is_contiguous()
        for key in algorithm.state_keys:
            value = state.get(key)
            if value is None:
                continue
            shard = value if type(value) is Tensor else local(value)
            if shard.device != device:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but {key!r} in the state of parameter "
                    f"{name(p)!r} is on {shard.device}, and the parameter on {device}: move it there "
                    "before the step"
                )
            if key not in algorithm.moments:
                continue
            if shard.shape != shape:
                raise RuntimeError(
                    f"{key!r} in the state of parameter {name(p)!r} must have the parameter's shape, "
                    f"{tuple(shape)}, got {tuple(shard.shape)}: delete the state of parameters that are "
                    "given another shape, or put new parameters into the groups"
                )
            if not (is_contiguous and shard.is_contiguous()):
                laid_out = match_layout(w, shard)
                if laid_out is not shard:
                    state[key] = laid_out_as(p, laid_out)
                    shard = laid_out
            own.append(shard)
        if own and algorithm.counts_steps and "step" not in state:
            raise RuntimeError(
                f"the state of parameter {name(p)!r} must hold 'step' beside {list(state)}: delete all of "
                "its state to start anew"
            )
    return moments
