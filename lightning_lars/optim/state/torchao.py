"""Optimizer state in 8 bits: block-wise dynamic quantization (Dettmers et al. 2021, arXiv:2110.02861)."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lars.sharding.shards import laid_out_as, local

BLOCK_SIZE = 256
"""Elements that share a scale."""


def import_eight_bit_tensor() -> Any:
    """Return torchao's tensor of optimizer state in 8 bits.

    Raises:
        ImportError: If torchao is not installed, or cannot work with this torch.
    """
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except (AttributeError, ImportError) as error:  # the first is what an older torch gives
        raise ImportError(
            "8-bit state needs torchao, which is not installed, or too new for this torch "
            f"({torch.__version__}): pip install 'lightning-lars[8bit]'"
        ) from error
    _complete(OptimState8bit)
    return OptimState8bit


@cache
def _complete(tensor_class: Any) -> None:
    """Give torchao's tensor what deepcopy() of an optimizer and loading a full state dict ask for."""

    def clone(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        (x,) = args
        return tensor_class(x.codes.clone(), x.scale.clone(), x.qmap.clone(), x.signed, dtype=x.dtype)

    def broadcast(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        tensors, group, source, *others = args
        if dist.ProcessGroup.unbox(group).rank() != source:
            raise NotImplementedError("8-bit state cannot receive a broadcast: receive into a plain tensor")
        for x in tensors:
            if x.signed:
                # What is largest in a block is -1 of its scale, but held as -0.993. The others, who get
                # floats and quantize them, find the same codes and scale only if they see it.
                x.qmap = x.qmap.clone()
                x.qmap[0] = -1.0
        return func([x.dequantize() for x in tensors], group, source, *others, **kwargs)

    def gathered(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        (x,) = args
        # torchao's own leaves tensors inside that nobody waits for, and that a checkpoint cannot hold.
        codes, scale = (torch.ops._c10d_functional.wait_tensor(part) for part in (x.codes, x.scale))
        return tensor_class(codes, scale, x.qmap.clone(), x.signed, dtype=x.dtype)

    tensor_class.implements(torch.ops.aten.clone.default)(clone)
    if dist.is_available():
        tensor_class.implements(torch.ops.c10d.broadcast_.default)(broadcast)
        if hasattr(torch.ops._c10d_functional, "_wrap_tensor_autograd"):  # older ones do not wrap it
            tensor_class.implements(torch.ops._c10d_functional._wrap_tensor_autograd.default)(gathered)


def is_eight_bit(tensor: Tensor) -> bool:
    """Tell whether the part of a tensor that is here is in 8 bits."""
    return hasattr(local(tensor), "qmap")


def fits_eight_bit(p: Any, min_8bit_size: int) -> bool:
    """Tell whether the state of a parameter is to be held in 8 bits.

    That of a DTensor is, if all processes hold the same number of elements, so that all decide alike.

    Args:
        p: The parameter.
        min_8bit_size: Elements, here, from which on it is.
    """
    if hasattr(p, "device_mesh"):
        for dimension, placement in enumerate(p.placements):
            if placement.is_shard() and p.shape[placement.dim] % p.device_mesh.size(dimension):
                return False
        if any(not (placement.is_shard() or placement.is_replicate()) for placement in p.placements):
            return False
    size = local(p).numel()
    return size >= max(min_8bit_size, 1) and size % BLOCK_SIZE == 0


class Maps:
    """The numbers that codes stand for, on each device, where a step must not wait for them to be copied.

    One optimizer's, so that they are copied on the stream that it steps on, and live as long as CUDA graphs
    of its steps may read them.
    """

    def __init__(self) -> None:
        self._maps: dict[tuple[bool, torch.device], Tensor] = {}

    def map(self, signed: bool, device: torch.device) -> Tensor:
        """Return the map of numbers with a sign, or of those without."""
        known = self._maps.get((signed, device))
        if known is None:
            with torch.device("cpu"):
                zeros = import_eight_bit_tensor().zeros((BLOCK_SIZE,), signed, BLOCK_SIZE, device="cpu")
            on_host = zeros.qmap.pin_memory() if device.type == "cuda" else zeros.qmap
            known = self._maps[signed, device] = on_host.to(device, non_blocking=True)
        return known


def to_float(state: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """Dequantize what of the state of a parameter is in 8 bits, laid out in memory as the parameter is.

    Returns:
        What was in 8 bits, by key.
    """
    held = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and is_eight_bit(value):
            part, held[key] = local(p), value
            floats = torch.empty_like(part, dtype=torch.promote_types(part.dtype, torch.float32))
            state[key] = laid_out_as(p, floats.copy_(local(value).dequantize()))
    return held


def to_eight_bit(state: dict[str, Any], p: Tensor, maps: Maps, held: Mapping[str, Tensor]) -> None:
    """Quantize what of the state of a parameter is of its size, and is not in 8 bits yet.

    Args:
        state: Of the parameter.
        p: The parameter.
        maps: What codes stand for.
        held: What :func:`to_float` returned, which takes the codes again: a CUDA graph knows their address.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and key != "step" and not is_eight_bit(value):
            part = local(p)
            whole = held.get(key)
            if whole is None:
                whole = laid_out_as(p, eight_bit_zeros(part, key, maps))
            eight_bit: Any = local(whole)
            eight_bit.qmap = maps.map(is_signed(key), part.device)
            eight_bit.copy_(local(value).float().contiguous())
            state[key] = whole


def is_signed(key: str) -> bool:
    """Tell whether codes stand for numbers with a sign.

    What is a mean of squares has no sign, and twice as many steps without.
    """
    return key != "exp_avg_sq"


def eight_bit_zeros(part: Tensor, key: str, maps: Maps) -> Any:
    """Return state of 8 bits, all 0, for what is here of a parameter."""
    codes = torch.zeros(part.shape, dtype=torch.uint8, device=part.device)
    scale = torch.zeros(part.numel() // BLOCK_SIZE, dtype=torch.float32, device=part.device)
    signed = is_signed(key)
    qmap = maps.map(signed, part.device)
    return import_eight_bit_tensor()(codes, scale, qmap, signed, dtype=torch.float32)


def plain_state_dict(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with plain tensors in place of those in 8 bits, but for those of a DTensor.

    Lightning reads checkpoints in a way, with a function for ``map_location``, that torch has for plain
    tensors only.
    """
    return _map_state(saved, _to_plain)


def eight_bit_state_dict(saved: Mapping[str, Any], *, in_floats: bool = False) -> dict[str, Any]:
    """Undo :func:`plain_state_dict`.

    Args:
        saved: A state dict, in which other mappings than those from there may be.
        in_floats: Whether to dequantize what was in 8 bits, which does not need torchao.
    """
    return _map_state(saved, _to_floats if in_floats else _from_plain)


def dequantize(codes: Tensor, qmap: Tensor, scale: Tensor, block_size: int) -> Tensor:
    """Return the values of codes, each a share of the scale of its block.

    Args:
        codes: Indices in ``qmap``, of any shape.
        qmap: Shares, shape ``(256,)``.
        scale: The largest of each block of codes, one after the other in memory; the last may be shorter.
        block_size: Codes in a block.
    """
    scales = scale.repeat_interleave(block_size)[: codes.numel()]
    return (qmap[codes.reshape(-1).long()] * scales).view(codes.shape)


def _map_state(saved: Mapping[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    state = {
        number: {key: function(value) for key, value in of_param.items()}
        if isinstance(of_param, Mapping)
        else of_param
        for number, of_param in saved["state"].items()
    }
    return {**saved, "state": state}


def _to_plain(value: Any) -> Any:
    if not hasattr(value, "qmap"):
        return value
    return {"codes": value.codes, "scale": value.scale, "qmap": value.qmap, "signed": value.signed}


def _is_plain(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() == {"codes", "scale", "qmap", "signed"}


def _from_plain(value: Any) -> Any:
    return import_eight_bit_tensor()(**value, dtype=torch.float32) if _is_plain(value) else value


def _to_floats(value: Any) -> Any:
    if not _is_plain(value):
        return value
    codes, scale = value["codes"], value["scale"]
    return dequantize(codes, value["qmap"], scale, codes.numel() // scale.numel())
