"""State stored in 8 bits between steps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Algorithm
from lightning_lars.optim.backends.choice import uses_triton
from lightning_lars.optim.batches import Batch
from lightning_lars.optim.state.code_table import CodeTable
from lightning_lars.optim.state.plain import BatchState, PlainState, States
from lightning_lars.optim.state.torchao import (
    QuantizationMaps,
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
    """Stores the moments of large layers in 8 bits between steps.

    A step dequantizes them to float32, one batch of layers at a time, and quantizes the updated moments. It
    computes the same weights and trust ratios as a step from the same moments in 32 bits.

    Args:
        min_8bit_size: Default for the smallest layer, in elements of the local shard, with 8-bit moments.
        qmaps: The quantization maps; new ones by default.
    """

    rules = {"min_8bit_size": WHOLE}  # noqa: RUF012

    def __init__(self, min_8bit_size: int, qmaps: QuantizationMaps | None = None) -> None:
        super().__init__()
        self.defaults = {"min_8bit_size": min_8bit_size}
        self._qmaps = QuantizationMaps() if qmaps is None else qmaps

    def fresh(self) -> "EightBitState":
        """Return a new object, with the same quantization maps, for state that was loaded."""
        return EightBitState(**self.defaults, qmaps=self._qmaps)

    def check(self, shards: Mapping[str, Any]) -> None:
        """Raise RuntimeError if one of these shards, given by name, is not supported."""
        for name, shard in shards.items():
            if shard.unit is not None:
                raise RuntimeError(
                    f"8-bit state cannot be sharded by FullyShardedDataParallel, which holds parameter "
                    f"{name!r}: use fully_shard (FSDP2, ModelParallelStrategy), or 32-bit state"
                )

    def split(self, batch: Batch, moments: Sequence[str]) -> Iterable[Batch]:
        """Split a batch into layers whose moments a kernel reads in 8 bits, and those to unpack."""
        if not moments or torch.compiler.is_compiling() or not uses_triton(batch.weights[0]):
            return [batch]
        flags = [self._is_read_in_eight_bit(batch, i, moments) for i in range(len(batch.params))]
        parts = (_select(batch, flags, in_eight_bit) for in_eight_bit in (True, False))
        return [part for part in parts if part.params]

    def of_batch(self, states: States, batch: Batch, algorithm: type[Algorithm]) -> BatchState:
        """Return the state of the layers of a batch."""
        if batch.in_eight_bit:
            return EightBitBatchState(states, batch, algorithm, self._qmaps)
        return super().of_batch(states, batch, algorithm)

    def why_not_in_triton(self, batch: Batch) -> str | None:
        """Return why the Triton kernel does not support this state, None if it does."""
        # Sharded layers wait together for the all-reduce of their norms: all would be unpacked at once.
        size = batch.group["min_8bit_size"]
        if batch.is_sharded and not batch.in_eight_bit and any(fits_eight_bit(p, size) for p in batch.params):
            return "no kernel reads the 8-bit state of sharded layers that are not contiguous in memory"
        return None

    def _is_read_in_eight_bit(self, batch: Batch, i: int, moments: Sequence[str]) -> bool:
        state = batch.states[i] or {}
        return (
            fits_eight_bit(batch.params[i], batch.group["min_8bit_size"])
            and batch.weights[i].is_contiguous()
            and batch.grads[i].is_contiguous()
            and all(state.get(key) is None or is_eight_bit(state[key]) for key in moments)
        )

    def tensors(self, states: Iterable[Mapping[str, Any]]) -> list[Tensor]:
        """Return the plain tensors in the state of layers, those of 8-bit moments instead of them."""
        tensors: list[Tensor] = []
        maps: dict[int, Tensor] = {}
        for value in super().tensors(states):
            if is_eight_bit(value):
                codes, scale, qmap = _parts(value)
                tensors += (codes, scale)
                maps[id(qmap)] = qmap
            else:
                tensors.append(value)
        return [*tensors, *maps.values()]

    def zero(self, states: States, groups: Sequence[Mapping[str, Any]]) -> None:
        """Zero the state after a dry run, keeping its structure."""
        super().convert_loaded(states, groups)
        super().zero(states, groups)
        self.convert_loaded(states, groups)

    def plain_moments(self, moments: list[list[Tensor]]) -> list[list[Tensor]]:
        """Return the moments of each layer that are held in plain tensors."""
        # A kernel gets the others in float32, in the memory layout of their parameter.
        return [[moment for moment in own if not is_eight_bit(moment)] for own in moments]

    @contextmanager
    def unpacked(self, states: States, batch: Batch) -> Iterator[None]:
        """Provide the moments in plain tensors of float32 or wider, within a ``with`` block."""
        quantized = {p: to_float(states[p], p) for p in batch.params if p in states}
        try:
            yield
        finally:
            for p in batch.params:
                if p in states:
                    self._pack(p, states[p], batch.group, quantized.get(p, {}))

    @torch.no_grad()
    def convert_loaded(self, states: States, groups: Sequence[Mapping[str, Any]]) -> None:
        """Convert state that was loaded, in any form, to the form in which it is stored here."""
        for group in groups:
            for p in group["params"]:
                if p in states:
                    self._pack(p, states[p], group, {})

    def save(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict in which all tensors are plain: 8-bit tensors become codes and scales."""
        return plain_state_dict(state_dict)

    def _pack(
        self, p: Tensor, state: dict[str, Any], group: Mapping[str, Any], quantized: Mapping[str, Tensor]
    ) -> None:
        if fits_eight_bit(p, group["min_8bit_size"]):
            to_eight_bit(state, p, self._qmaps, quantized)
        else:
            to_float(state, p)


class EightBitBatchState(BatchState):
    """The state of the layers of a batch, during a step by a kernel that reads and writes 8-bit moments.

    Args:
        states: The state of the optimizer, by parameter.
        batch: The layers.
        algorithm: The algorithm of the optimizer.
        qmaps: The quantization maps.
    """

    def __init__(
        self, states: States, batch: Batch, algorithm: type[Algorithm], qmaps: QuantizationMaps
    ) -> None:
        super().__init__(states, batch, algorithm)
        self._qmaps = qmaps
        self._moments: list[list[Any]] = []
        self._has_own_maps = True

    def columns(self) -> list[list[Tensor]]:
        """Return the tensors of the moments in use that a kernel reads, one list of all layers for each.

        There are three lists for each moment: codes, scales and quantization maps. The maps come from the
        state, because state loaded from a checkpoint may have other maps than ours.
        """
        self._moments = super().columns()
        return [list(part) for moment in self._moments for part in zip(*map(_parts, moment), strict=True)]

    def end_step(self) -> None:
        """Record that a kernel has written the moments in 8 bits, with our own quantization maps."""
        for moment, signed in zip(self._moments, self._signed(), strict=True):
            qmap = self._qmaps.get(signed, self._device)
            for value in moment:
                self._has_own_maps = self._has_own_maps and value.qmap is qmap
                value.qmap = qmap

    def can_repeat(self) -> bool:
        """Return whether the quantization maps that this step read are those that it wrote with."""
        return self._has_own_maps

    def code_tables(self) -> tuple[CodeTable, ...]:
        """Return the table of nearest codes of each moment in use that is stored in 8 bits."""
        return tuple(self._qmaps.code_table(signed, self._device) for signed in self._signed())

    @property
    def _device(self) -> torch.device:
        return self.batch.weights[0].device

    def _signed(self) -> list[bool]:
        """Return whether each moment in use is signed."""
        return [is_signed(key) for key in self._algorithm.moments if key in self._used]

    def _zeros(self, key: str, w: Tensor) -> Tensor:
        zeros: Tensor = eight_bit_zeros(w, key, self._qmaps)
        return zeros


def _parts(value: Any) -> tuple[Tensor, Tensor, Tensor]:
    return value.codes, value.scale, value.qmap


def _select(batch: Batch, flags: Sequence[bool], in_eight_bit: bool) -> Batch:
    """Return the layers of a batch whose flag is ``in_eight_bit``."""
    lists = (batch.params, batch.weights, batch.grads, batch.states)
    params, weights, grads, states = (
        [value for value, flag in zip(values, flags, strict=True) if flag is in_eight_bit] for values in lists
    )
    selected = batch._replace(params=params, weights=weights, grads=grads, states=states)
    return selected._replace(in_eight_bit=in_eight_bit)
