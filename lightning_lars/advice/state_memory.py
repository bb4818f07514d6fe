"""The memory of an optimizer's state."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_lars.optim.state.torchao import BLOCK_SIZE, fits_eight_bit
from lightning_lars.sharding.shards import local

MIN_8BIT_SIZE = 4096
"""The default of ``LARS8bit`` and ``LAMB8bit``."""
_FLOAT = 4
_QUANTIZATION_MAP = 256 * _FLOAT


def expected_bytes(params: Iterable[Tensor]) -> dict[str, int]:
    """Return the bytes of state for parameters, on the device that holds them, by optimizer.

    Momentum takes 4 bytes for each element, Adam's and LAMB's two moments 8, and twice as much for parameters
    in double precision; a count of steps takes 4 for each tensor. In 8 bits a moment takes 1, and 4 for the
    scale of each 256 elements, where the layer is large enough. The quantization maps of 1,024 bytes are
    shared by all layers.

    Args:
        params: The parameters that are trained, or their shards.

    Example:
        >>> import torch
        >>> from lightning_lars.advice.state_memory import expected_bytes
        >>> expected_bytes([torch.zeros(64, 64), torch.zeros(64)])
        {'LARS': 16640, 'LAMB': 33288, 'LARS8bit': 5440, 'LAMB8bit': 10888}
    """
    lars, lars_8bit, tensors, has_maps = 0, 0, 0, False
    for p in params:
        size = local(p).numel()
        tensors += 1
        full = max(_FLOAT, p.element_size()) * size  # single precision for half-precision parameters
        lars += full
        in_eight_bit = fits_eight_bit(p, MIN_8BIT_SIZE)
        has_maps |= in_eight_bit
        lars_8bit += size + _FLOAT * size // BLOCK_SIZE if in_eight_bit else full
    steps = _FLOAT * tensors
    maps = _QUANTIZATION_MAP * has_maps
    return {
        "LARS": lars,
        "LAMB": 2 * lars + steps,
        "LARS8bit": lars_8bit + maps,
        "LAMB8bit": 2 * lars_8bit + steps + 2 * maps,
    }


def held_bytes(states: Iterable[Mapping[str, Any]]) -> int:
    """Return the bytes of the tensors in optimizer states, on this device; shared memory counts once."""
    sizes: dict[int, int] = {}
    for state in states:
        for value in state.values():
            if isinstance(value, Tensor):
                for part in _parts(local(value)):
                    storage = part.untyped_storage()
                    sizes[storage.data_ptr()] = max(sizes.get(storage.data_ptr(), 0), _bytes(part))
    return sum(sizes.values())


def _parts(tensor: Any) -> Iterable[Tensor]:
    """Yield the plain tensors in one of a subclass, such as those of torchao."""
    if type(tensor) is Tensor or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
