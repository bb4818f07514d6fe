"""LARS and LAMB whose state is held in 8 bits between the steps."""

from collections.abc import Iterable
from typing import Any

from lightning_lars.optim.lamb import LAMB
from lightning_lars.optim.lars import LARS
from lightning_lars.optim.state.eight_bit import EightBitState
from lightning_lars.optim.state.torchao import import_eight_bit_tensor


class LARS8bit(LARS):
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
        self._storage = EightBitState(min_8bit_size)
        super().__init__(params, *args, **kwargs)


class LAMB8bit(LAMB):
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
        self._storage = EightBitState(min_8bit_size)
        super().__init__(params, *args, **kwargs)
