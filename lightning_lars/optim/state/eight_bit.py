"""The state of layers, held in 8 bits between the steps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Algorithm
from lightning_lars.optim.backends.choice import uses_triton
from lightning_lars.optim.batches import Batch
from lightning_lars.optim.state.plain import BatchState, PlainState, States
from lightning_lars.optim.state.torchao import (
    Maps,
    eight_bit_zeros,
    fits_eight_bit,
    is_eight_bit,
    is_signed,
    plain_state_dict,
    to_eight_bit,
    to_float,
)
from lightning_lars.rules import WHOLE


class EightBitState(PlainState):
    """How state is held between steps: in 8 bits, where a layer is large enough.

    A step holds the state of some layers at a time in float32, so that all that it computes, trust ratios
    among it, is what is computed from the same state in 32 bits.
    """

    rules = {"min_8bit_size": WHOLE}  # noqa: RUF012

    def __init__(self, min_8bit_size: int, maps: Maps | None = None) -> None:
        super().__init__()
        self.defaults = {"min_8bit_size": min_8bit_size}
        self._maps = Maps() if maps is None else maps

    def fresh(self) -> "EightBitState":
        """Return the same for state that has been loaded."""
        return EightBitState(**self.defaults, maps=self._maps)

    def check(self, shards: Mapping[str, Any]) -> None:
        """Raise RuntimeError if it cannot be held for one of these shards, given by name."""
        for name, shard in shards.items():
            if shard.unit is not None:
                raise RuntimeError(
                    f"8-bit state cannot be sharded by FullyShardedDataParallel, which holds parameter "
                    f"{name!r}: use fully_shard (FSDP2, ModelParallelStrategy), or 32-bit state"
                )

    def split(self, batch: Batch, moments: Sequence[str]) -> Iterable[Batch]:
        """Return a batch in parts whose moments in use are all read and written in 8 bits, or opened."""
        if not moments or torch.compiler.is_compiling() or not uses_triton(batch.weights[0]):
            return [batch]
        in_eight_bit = [self._stays_in_eight_bit(batch, i, moments) for i in range(len(batch.params))]
        parts = (_chosen(batch, in_eight_bit, is_chosen) for is_chosen in (True, False))
        return [part for part in parts if part.params]

    def of_batch(self, states: States, batch: Batch, algorithm: type[Algorithm]) -> BatchState:
        """Return the state of the layers of a batch."""
        if batch.in_eight_bit:
            return EightBitBatchState(states, batch, algorithm, self._maps)
        return super().of_batch(states, batch, algorithm)

    def why_not_in_triton(self, batch: Batch) -> str | None:
        """Return why no kernel in Triton can work on it, None if one can."""
        # Opened, it would be float32 for all layers at once while they wait for their norms.
        size = batch.group["min_8bit_size"]
        if batch.is_sharded and not batch.in_eight_bit and any(fits_eight_bit(p, size) for p in batch.params):
            return "no kernel opens the 8-bit state of layers that are sharded, and not contiguous in memory"
        return None

    def _stays_in_eight_bit(self, batch: Batch, i: int, moments: Sequence[str]) -> bool:
        state = batch.states[i] or {}
        return (
            fits_eight_bit(batch.params[i], batch.group["min_8bit_size"])
            and batch.weights[i].is_contiguous()
            and batch.grads[i].is_contiguous()
            and all(state.get(key) is None or is_eight_bit(state[key]) for key in moments)
        )

    def can_repeat(self, states: States) -> bool:
        """Tell whether the next step finds it as a step has left it, unless someone else has changed it."""
        return False

    def zero(self, states: States, groups: Sequence[Mapping[str, Any]]) -> None:
        """Leave of a step, which was a trial, only that there is state."""
        super().convert_loaded(states, groups)
        super().zero(states, groups)
        self.convert_loaded(states, groups)

    def plain_moments(self, moments: list[list[Tensor]]) -> list[list[Tensor]]:
        """Return the moments of each layer that are held in plain tensors."""
        # A kernel sees the others in float32, in the memory layout of their parameter.
        return [[moment for moment in own if not is_eight_bit(moment)] for own in moments]

    @contextmanager
    def unpacked(self, states: States, batch: Batch) -> Iterator[None]:
        """Hold moments in plain tensors of float32 or wider, for the length of a block."""
        held = {p: to_float(states[p], p) for p in batch.params if p in states}
        try:
            yield
        finally:
            for p in batch.params:
                if p in states:
                    self._pack(p, states[p], batch.group, held.get(p, {}))

    @torch.no_grad()
    def convert_loaded(self, states: States, groups: Sequence[Mapping[str, Any]]) -> None:
        """Hold state that has been loaded, in whatever form, as it is held here."""
        for group in groups:
            for p in group["params"]:
                if p in states:
                    self._pack(p, states[p], group, {})

    def save(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict of it in which all tensors are plain, those of 8 bits as codes and scales."""
        return plain_state_dict(state_dict)

    def _pack(
        self, p: Tensor, of_layer: dict[str, Any], group: Mapping[str, Any], held: Mapping[str, Tensor]
    ) -> None:
        if fits_eight_bit(p, group["min_8bit_size"]):
            to_eight_bit(of_layer, p, self._maps, held)
        else:
            to_float(of_layer, p)


class EightBitBatchState(BatchState):
    """The state of the layers of a batch, in the middle of a step by a kernel that takes it in 8 bits.

    Args:
        states: Of all layers.
        batch: The layers.
        algorithm: Of the optimizer.
        maps: What codes stand for.
    """

    def __init__(self, states: States, batch: Batch, algorithm: type[Algorithm], maps: Maps) -> None:
        super().__init__(states, batch, algorithm)
        self._maps = maps
        self._moments: list[list[Any]] = []

    def columns(self) -> list[list[Tensor]]:
        """Return all that a kernel reads of the moments in use: tensors of all layers, list by list.

        For each moment codes, scales, and what the codes stand for, which a checkpoint may have brought.
        """
        self._moments = super().columns()
        names = ("codes", "scale", "qmap")
        return [[getattr(value, name) for value in moment] for moment in self._moments for name in names]

    def end_step(self) -> None:
        """Take note that a kernel has written the moments in 8 bits, as codes of our own maps."""
        for moment, own_map in zip(self._moments, self.maps(), strict=True):
            for value in moment:
                value.qmap = own_map

    def maps(self) -> tuple[Tensor, ...]:
        """Return what codes stand for, for each moment in use, where it is held in 8 bits."""
        device = self.batch.weights[0].device
        keys = (key for key in self._algorithm.moments if key in self._used)
        return tuple(self._maps.map(is_signed(key), device) for key in keys)

    def _zeros(self, key: str, w: Tensor) -> Tensor:
        zeros: Tensor = eight_bit_zeros(w, key, self._maps)
        return zeros


def _chosen(batch: Batch, flags: Sequence[bool], flag: bool) -> Batch:
    """Return the layers of a batch that have this flag."""
    lists = (batch.params, batch.weights, batch.grads, batch.states)
    params, weights, grads, states = (
        [value for value, own in zip(values, flags, strict=True) if own is flag] for values in lists
    )
    return batch._replace(params=params, weights=weights, grads=grads, states=states, in_eight_bit=flag)
