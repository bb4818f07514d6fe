"""LARS and LAMB with their moments in 8 bits."""

from collections.abc import Iterable
from typing import Any

from lightning_lars.optim.lamb import LAMB
from lightning_lars.optim.lars import LARS
from lightning_lars.optim.layerwise import LayerwiseOptimizer
from lightning_lars.optim.state.eight_bit import EightBitState
from lightning_lars.optim.state.torchao import import_eight_bit_tensor
from lightning_lars.rules import as_int


class _EightBitOptimizer(LayerwiseOptimizer):
    """A layer-wise optimizer that stores its moments in 8 bits."""

    def __init__(self, params: Iterable[Any], *args: Any, min_8bit_size: int = 4096, **kwargs: Any) -> None:
        import_eight_bit_tensor()
        self._storage = EightBitState(as_int(min_8bit_size))
        super().__init__(params, *args, **kwargs)


class LARS8bit(_EightBitOptimizer, LARS):
    """:class:`LARS` with its momentum in 8 bits, a quarter of the memory.

    Momentum is quantized block-wise (Dettmers et al. 2021, arXiv:2110.02861), 256 elements to a scale, and
    stored in torchao's tensors. Each step dequantizes it, computes as :class:`LARS` does, and quantizes it
    again. Momentum stays in 32 bits where the layer, or its local shard, has fewer than ``min_8bit_size``
    elements or a number of elements that is not a multiple of 256.

    Args:
        params: Parameters, as in :class:`LARS`.
        *args: Positional arguments of :class:`LARS`.
        min_8bit_size: The smallest layer, in elements and at least 0, whose momentum is in 8 bits. It can
            be set for each group.
        **kwargs: Keyword arguments of :class:`LARS`.

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


class LAMB8bit(_EightBitOptimizer, LAMB):
    """:class:`LAMB` with both moments in 8 bits, a quarter of the memory.

    They are quantized as in :class:`LARS8bit`; the codes of the second moment are unsigned.

    Args:
        params: Parameters, as in :class:`LAMB`.
        *args: Positional arguments of :class:`LAMB`.
        min_8bit_size: As in :class:`LARS8bit`, for both moments.
        **kwargs: Keyword arguments of :class:`LAMB`.

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
