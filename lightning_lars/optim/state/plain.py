"""The state of layers, held in plain tensors."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Algorithm
from lightning_lars.optim.backends.choice import match_layout
from lightning_lars.optim.batches import Batch
from lightning_lars.optim.state.torchao import to_float
from lightning_lars.rules import Rule
from lightning_lars.sharding.shards import laid_out_as, local

States = MutableMapping[Any, dict[str, Any]]
"""The state of every layer, as ``torch.optim`` keeps it."""


class PlainState:
    """How state is held between steps: each moment in a tensor of float32 or wider."""

    rules: Mapping[str, Rule] = {}
    """Of hyperparameters that are its own."""

    defaults: Mapping[str, Any] = {}
    """Of these, in groups that do not name them."""

    def __init__(self) -> None:
        # The layers whose state is that of a trial, and whose first step is still to come.
        self._tried: set[Tensor] = set()

    def fresh(self) -> "PlainState":
        """Return the same for state that has been loaded."""
        return PlainState()

    def check(self, shards: Mapping[str, Any]) -> None:
        """Raise RuntimeError if it cannot be held for one of these shards, given by name."""

    def why_not_in_triton(self, batch: Batch) -> str | None:
        """Return why no kernel in Triton can work on it, None if one can."""
        return None

    def first_step_test(self, states: States, kept: Sequence[str]) -> Callable[[Tensor], bool]:
        """Return a function that tells whether a layer is without one of these moments of a step before."""
        tried = self._tried

        def is_first(p: Tensor) -> bool:
            of_layer = states.get(p)
            if of_layer is None or (tried and p in tried):
                return bool(kept)
            for key in kept:  # noqa: SIM110, as a generator takes three times as long
                if of_layer.get(key) is None:
                    return True
            return False

        return is_first

    def end_step(self, params: Iterable[Tensor]) -> None:
        """Take note of the layers that have taken a step."""
        if self._tried:
            self._tried.difference_update(params)

    def keep_only(self, params: Iterable[Tensor]) -> None:
        """Forget what has left the groups."""
        self._tried.intersection_update(params)

    def zero(self, states: States, groups: Sequence[Mapping[str, Any]]) -> None:
        """Leave of a step, which was a trial, only that there is state."""
        for of_layer in states.values():
            for value in of_layer.values():
                value.zero_()
        self._tried.update(states)

    def plain_moments(
        self, states: States, params: Iterable[Tensor], keys: Iterable[str]
    ) -> list[list[Tensor]]:
        """Return the moments of each layer, as far as they are here, which are not opened for a step."""
        keys = set(keys)
        of_layers: Iterable[Mapping[str, Any]] = (states.get(p, {}) for p in params)
        return [
            [local(value) for key, value in of_layer.items() if key in keys and value is not None]
            for of_layer in of_layers
        ]

    def unpacked(self, states: States, batch: Batch) -> AbstractContextManager[None]:
        """Hold moments in plain tensors of float32 or wider, for the length of a block."""
        return nullcontext()

    def convert_loaded(self, states: States, groups: Sequence[Mapping[str, Any]]) -> None:
        """Hold state that has been loaded, in whatever form, as it is held here."""
        for p, of_layer in states.items():
            to_float(of_layer, p)

    def save(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict of it in which all tensors are plain."""
        return state_dict


class BatchState:
    """The state of the layers of a batch, in the middle of a step."""

    def __init__(self, states: States, batch: Batch, algorithm: type[Algorithm]) -> None:
        self._states, self._batch, self._algorithm = states, batch, algorithm
        self._kept = algorithm.used_moments(batch.h)
        self._of_layers: list[dict[str, Any]] = []

    def moments(self) -> list[list[Tensor] | None]:
        """Return each moment of all layers, 0 before their first step; None for one that is not kept."""
        if not self._kept:
            return [None] * len(self._algorithm.moments)
        self._of_layers = of_layers = [self._states[p] for p in self._batch.params]
        if self._batch.is_first:
            for p, part, of_layer in zip(self._batch.params, self._batch.weights, of_layers, strict=True):
                self._begin(p, part, of_layer)
        return [
            [local(of_layer[key]) for of_layer in of_layers] if key in self._kept else None
            for key in self._algorithm.moments
        ]

    def next_steps(self) -> list[Tensor]:
        """Count a step, and return the count of each layer; call :meth:`moments` first."""
        steps = [of_layer["step"] for of_layer in self._of_layers]
        torch._foreach_add_(steps, 1.0)
        return steps

    def _begin(self, p: Tensor, part: Tensor, of_layer: dict[str, Any]) -> None:
        if self._algorithm.counts_steps and "step" not in of_layer:
            of_layer["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
        if self._algorithm.norm_moment is not None:
            number_of(self._states, p, self._algorithm.norm_moment)
        dtype = torch.promote_types(part.dtype, torch.float32)
        for key in self._kept:
            if of_layer.get(key) is None:
                of_layer[key] = laid_out_as(p, torch.zeros_like(part, dtype=dtype))


def number_of(states: States, p: Tensor, key: str) -> Tensor:
    """Return a number that is kept for a layer, 0 at first."""
    of_layer = states[p]
    if of_layer.get(key) is None:
        dtype = torch.promote_types(p.dtype, torch.float32)
        of_layer[key] = torch.zeros((), dtype=dtype, device=p.device)
    number: Tensor = of_layer[key]
    return number


def lay_out_state(
    states: States, batch: Batch, algorithm: type[Algorithm], name: Callable[[Tensor], str]
) -> None:
    """Lay out state in memory as its layer is, which may have changed since (``channels_last``).

    Raises:
        RuntimeError: If it is not on the device of its layer, or has another shape.
    """
    for p, part in zip(batch.params, batch.weights, strict=True):
        shape = part.shape
        for key, value in states.get(p, {}).items():
            if key not in algorithm.state_keys or value is None:
                continue
            here = local(value)
            if here.device != part.device:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but {key!r} in the state of parameter "
                    f"{name(p)!r} is on {here.device}, and the parameter on {part.device}: move it there "
                    "before the step"
                )
            if here.shape != shape and key in algorithm.moments:
                raise RuntimeError(
                    f"{key!r} in the state of parameter {name(p)!r} must have the parameter's shape, "
                    f"{tuple(shape)}, got {tuple(here.shape)}: delete the state of parameters that are given "
                    "another shape, or put new parameters into the groups"
                )
            if not (here.is_contiguous() and part.is_contiguous()):
                laid_out = match_layout(part, here)
                if laid_out is not here:
                    states[p][key] = laid_out_as(p, laid_out)
