"""LARS and LAMB whose state is held in 8 bits between the steps."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_lars.optim.backends.choice import takes_triton
from lightning_lars.optim.lamb import LAMB
from lightning_lars.optim.lars import LARS
from lightning_lars.optim.layers import Layers
from lightning_lars.optim.layerwise import LayerwiseOptimizer
from lightning_lars.optim.state.torchao import (
    Maps,
    fits_eight_bit,
    import_eight_bit_tensor,
    is_eight_bit,
    plain_state_dict,
    to_eight_bit,
    to_float,
)
from lightning_lars.rules import WHOLE, check


class EightBitOptimizer(LayerwiseOptimizer):
    """A layer-wise optimizer whose state is held in 8 bits between the steps.

    A step holds the state of some layers at a time in float32, so that all that it computes, trust ratios
    among it, is what the 32-bit optimizer computes from the same state.
    """

    # Of groups that do not name it.
    _min_8bit_size: int

    _maps: Maps

    # What was in 8 bits, of layers in the middle of a step.
    _held: dict[Tensor, dict[str, Tensor]]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._maps, self._held = Maps(), {}
        super().__init__(params, {**defaults, "min_8bit_size": self._min_8bit_size})

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        check({"min_8bit_size": WHOLE}, group)

    def _look_at_params(self) -> None:
        super()._look_at_params()
        for p, shard in self._shards.items():
            if shard is not None and shard.unit is not None:
                raise RuntimeError(
                    f"8-bit state cannot be divided by FullyShardedDataParallel, which holds parameter "
                    f"{self._name(p)!r}: use fully_shard (FSDP2, ModelParallelStrategy), or 32-bit state"
                )

    def _are_fused(self, layers: Layers) -> bool:
        # The kernels in Triton read the state before and after the norms: it would be float32 for all layers
        # at once while they wait for their norms.
        if layers.are_divided and takes_triton(layers.parts[0]):
            if layers.group["fused"]:
                raise RuntimeError(
                    "fused=True, but no kernel works on the 8-bit state of layers that are divided between "
                    f"processes (parameter {self._name(layers.params[0])!r} ...): pass fused=None"
                )
            return False
        return super()._are_fused(layers)

    @contextmanager
    def _float_state(self, layers: Layers, *, before_norms: bool) -> Iterator[None]:
        advances = before_norms == self._advances_before_norms(layers.group)
        opens = closes = advances
        if layers.are_fused and takes_triton(layers.parts[0]):
            opens, closes = before_norms, not before_norms
        if opens:
            for p in layers.params:
                self._held[p] = to_float(self.state[p], p)
        try:
            yield
        finally:
            if closes:
                for p in layers.params:
                    self._pack(p, layers.group)

    def _pack(self, p: Tensor, group: Mapping[str, Any]) -> None:
        if fits_eight_bit(p, group["min_8bit_size"]):
            to_eight_bit(self.state[p], p, self._maps, self._held.pop(p, {}))
        else:
            to_float(self.state[p], p)
            self._held.pop(p, None)

    def _moments(self, params: Iterable[Tensor]) -> list[list[Tensor]]:
        # What is in 8 bits will be float32, laid out as its parameter, when a kernel sees it.
        moments = super()._moments(params)
        return [[value for value in of_layer if not is_eight_bit(value)] for of_layer in moments]

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict, with the codes and scales of what is in 8 bits as plain tensors."""
        # Ahead of the hooks of the caller, which have the last word.
        hook = self.register_state_dict_post_hook(lambda _, saved: plain_state_dict(saved), prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._held = {}
        if "_maps" not in self.__dict__:
            self._maps = Maps()

    def _forget_step(self) -> None:
        for p in self.state:
            to_float(self.state[p], p)
        super()._forget_step()
        self._fit_loaded_state()

    @torch.no_grad()
    def _fit_loaded_state(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:
                    self._pack(p, group)


class LARS8bit(LARS, EightBitOptimizer):
    """:class:`LARS` with its momentum in 8 bits: a quarter of the memory.

    Momentum is held in blocks of 256 elements that share a scale (Dettmers et al. 2021, arXiv:2110.02861), by
    torchao's tensors of optimizer state. A step dequantizes it, is :class:`LARS`, and quantizes it again.
    Momentum stays in 32 bits where a layer, or what of it is on this process, has fewer than
    ``min_8bit_size`` elements or a number that is no multiple of 256.

    Args:
        params: As in :class:`LARS`, and so are all arguments but the last.
        *args: Those of :class:`LARS`, by position.
        min_8bit_size: Elements from which on the momentum of a layer is in 8 bits, at least 0; a key of
            groups too.
        **kwargs: Those of :class:`LARS`, by name.

    Raises:
        ImportError: Without torchao (``pip install 'lightning-lars[8bit]'``).
        ValueError: If an argument breaks its rule.

    Example:
        >>> import torch
        >>> from lightning_lars import LARS8bit
        >>> w = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = LARS8bit([("w", w)], lr=1.0)
        >>> w.grad = torch.ones(64, 64)
        >>> optimizer.step()
        >>> v = optimizer.state[w]["momentum_buffer"]
        >>> type(v).__name__, v.codes.dtype
        ('OptimState8bit', torch.uint8)
    """

    def __init__(self, params: Iterable[Any], *args: Any, min_8bit_size: int = 4096, **kwargs: Any) -> None:
        import_eight_bit_tensor()
        self._min_8bit_size = min_8bit_size
        super().__init__(params, *args, **kwargs)


class LAMB8bit(LAMB, EightBitOptimizer):
    """:class:`LAMB` with its moments in 8 bits: a quarter of the memory.

    As in :class:`LARS8bit`; the second moment is held without a sign, in steps half as wide.

    Args:
        params: As in :class:`LAMB`, and so are all arguments but the last.
        *args: Those of :class:`LAMB`, by position.
        min_8bit_size: Elements from which on the moments of a layer are in 8 bits, at least 0; a key of
            groups too.
        **kwargs: Those of :class:`LAMB`, by name.

    Raises:
        ImportError: Without torchao (``pip install 'lightning-lars[8bit]'``).
        ValueError: If an argument breaks its rule.

    Example:
        >>> import torch
        >>> from lightning_lars import LAMB8bit
        >>> w = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = LAMB8bit([("w", w)], lr=0.1)
        >>> w.grad = torch.ones(64, 64)
        >>> optimizer.step()
        >>> sorted(key for key, v in optimizer.state[w].items() if hasattr(v, "codes"))
        ['exp_avg', 'exp_avg_sq']
    """

    def __init__(self, params: Iterable[Any], *args: Any, min_8bit_size: int = 4096, **kwargs: Any) -> None:
        import_eight_bit_tensor()
        self._min_8bit_size = min_8bit_size
        super().__init__(params, *args, **kwargs)
