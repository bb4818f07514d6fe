"""The state of layers, held in 8 bits between the steps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_lars.optim.backends.choice import uses_triton
from lightning_lars.optim.batches import Batch
from lightning_lars.optim.state.plain import PlainState, States
from lightning_lars.optim.state.torchao import (
    Maps,
    fits_eight_bit,
    is_eight_bit,
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

    def why_not_in_triton(self, batch: Batch) -> str | None:
        """Return why no kernel in Triton can work on it, None if one can."""
        # The state would be float32 for all layers at once while they wait for their norms.
        if batch.is_sharded and uses_triton(batch.weights[0]):
            return "no kernel works on the 8-bit state of layers that are sharded across ranks"
        return None

    def can_repeat(self, states: States) -> bool:
        """Tell whether the next step finds it as a step has left it, unless someone else has changed it."""
        return False

    def zero(self, states: States, groups: Sequence[Mapping[str, Any]]) -> None:
        """Leave of a step, which was a trial, only that there is state."""
        super().convert_loaded(states, groups)
        super().zero(states, groups)
        self.convert_loaded(states, groups)

    def plain_moments(self, batch: Batch, keys: Iterable[str]) -> list[list[Tensor]]:
        """Return the moments of each layer, as far as they are here, which are not opened for a step."""
        # What is in 8 bits will be float32, laid out as its parameter, when a kernel sees it.
        of_layers = super().plain_moments(batch, keys)
        return [[value for value in of_layer if not is_eight_bit(value)] for of_layer in of_layers]

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
