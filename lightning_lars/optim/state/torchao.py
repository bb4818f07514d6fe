"""Optimizer state in 8 bits: block-wise dynamic quantization (Dettmers et al. 2021, arXiv:2110.02861)."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lars.optim.state.code_table import CodeTable, code_table
from lightning_lars.sharding.shards import laid_out_as, local

BLOCK_SIZE = 256
"""The number of elements that share a scale."""


def import_eight_bit_tensor() -> Any:
    """Return torchao's tensor class for 8-bit optimizer state.

    Raises:
        ImportError: If torchao is not installed, or does not support this version of torch.
    """
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except (AttributeError, ImportError) as error:  # AttributeError with an older torch
        raise ImportError(
            "8-bit state needs torchao, which is not installed or too new for this version of torch "
            f"({torch.__version__}): pip install 'lightning-lars[8bit]'"
        ) from error
    _add_missing_operations(OptimState8bit)
    return OptimState8bit


@cache
def _add_missing_operations(tensor_class: Any) -> None:
    """Implement what copying an optimizer and loading or gathering a full state dict need of the class."""

    def clone(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        (x,) = args
        return tensor_class(x.codes.clone(), x.scale.clone(), x.qmap.clone(), x.signed, dtype=x.dtype)

    def broadcast(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        tensors, group, source, *others = args
        if dist.ProcessGroup.unbox(group).rank() != source:
            raise NotImplementedError("8-bit state cannot receive a broadcast: receive into a plain tensor")
        for x in tensors:
            if x.signed:
                # The lowest code stands for -0.993 of the scale, although the element was -1 of it. Receivers
                # quantize what they get, and find the same codes and scale only if it is sent as -1.
                x.qmap = x.qmap.clone()
                x.qmap[0] = -1.0
        return func([x.dequantize() for x in tensors], group, source, *others, **kwargs)

    def wrap_gathered(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        (x,) = args
        # torchao's own keeps asynchronous tensors inside, which a checkpoint cannot store.
        codes, scale = (torch.ops._c10d_functional.wait_tensor(part) for part in (x.codes, x.scale))
        return tensor_class(codes, scale, x.qmap.clone(), x.signed, dtype=x.dtype)

    tensor_class.implements(torch.ops.aten.clone.default)(clone)
    if dist.is_available():
        tensor_class.implements(torch.ops.c10d.broadcast_.default)(broadcast)
        if hasattr(torch.ops._c10d_functional, "_wrap_tensor_autograd"):  # since torch 2.11
            tensor_class.implements(torch.ops._c10d_functional._wrap_tensor_autograd.default)(wrap_gathered)


def is_eight_bit(tensor: Tensor) -> bool:
    """Return whether the local shard of a tensor is quantized."""
    return hasattr(local(tensor), "qmap")


def fits_eight_bit(p: Any, min_8bit_size: int) -> bool:
    """Return whether the moments of a parameter are to be quantized.

    The number of elements must be at least ``min_8bit_size`` and a multiple of :data:`BLOCK_SIZE`. A DTensor
    must also be sharded evenly, so that all ranks decide alike.

    Args:
        p: The parameter.
        min_8bit_size: The smallest local shard, in elements, to quantize.
    """
    if hasattr(p, "device_mesh"):
        for dimension, placement in enumerate(p.placements):
            if placement.is_shard() and p.shape[placement.dim] % p.device_mesh.size(dimension):
                return False
        if any(not (placement.is_shard() or placement.is_replicate()) for placement in p.placements):
            return False
    size = local(p).numel()
    return size >= max(min_8bit_size, 1) and size % BLOCK_SIZE == 0


class QuantizationMaps:
    """The quantization maps of one optimizer and their tables of codes, copied once to each device.

    A quantization map (torchao's ``qmap``) has shape ``(256,)`` and gives the value of each code, as a
    fraction of the scale. Each optimizer has its own maps: they are copied on the stream of its steps,
    without synchronizing, and live as long as the CUDA graphs that read them.
    """

    def __init__(self) -> None:
        self._qmaps: dict[tuple[bool, torch.device], Tensor] = {}
        self._code_tables: dict[tuple[bool, torch.device], CodeTable] = {}

    def get(self, signed: bool, device: torch.device) -> Tensor:
        """Return the map for signed or unsigned moments."""
        qmap = self._qmaps.get((signed, device))
        if qmap is None:
            qmap = self._qmaps[signed, device] = _on_device(_qmap_on_host(signed), device)
        return qmap

    def code_table(self, signed: bool, device: torch.device) -> CodeTable:
        """Return the table in which a kernel looks up the nearest codes of the map."""
        table = self._code_tables.get((signed, device))
        if table is None:
            on_host = _code_table_on_host(signed)
            thresholds, lowest = (_on_device(x, device) for x in (on_host.thresholds, on_host.lowest))
            table = on_host._replace(thresholds=thresholds, lowest=lowest)
            self._code_tables[signed, device] = table
        return table


@cache
def _qmap_on_host(signed: bool) -> Tensor:
    with torch.device("cpu"):
        zeros = import_eight_bit_tensor().zeros((BLOCK_SIZE,), signed, BLOCK_SIZE, device="cpu")
    qmap: Tensor = zeros.qmap
    return qmap


@cache
def _code_table_on_host(signed: bool) -> CodeTable:
    return code_table(_qmap_on_host(signed))


def _on_device(on_host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without synchronizing."""
    pinned = on_host.pin_memory() if device.type == "cuda" else on_host.clone()
    return pinned.to(device, non_blocking=True)


def to_float(state: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """Dequantize the state of a parameter in place, in the memory layout of the parameter.

    Returns:
        The quantized tensors that were replaced, by key.
    """
    quantized = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and is_eight_bit(value):
            shard, quantized[key] = local(p), value
            floats = torch.empty_like(shard, dtype=torch.promote_types(shard.dtype, torch.float32))
            state[key] = laid_out_as(p, floats.copy_(local(value).dequantize()))
    return quantized


def to_eight_bit(
    state: dict[str, Any], p: Tensor, qmaps: QuantizationMaps, quantized: Mapping[str, Tensor]
) -> None:
    """Quantize the moments of a parameter in place, except those that are quantized.

    Args:
        state: The state of the parameter.
        p: The parameter.
        qmaps: The quantization maps.
        quantized: The tensors that :func:`to_float` returned. They are written again, because a CUDA graph
            has recorded their addresses.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and key != "step" and not is_eight_bit(value):
            shard = local(p)
            moment = quantized.get(key)
            if moment is None:
                moment = laid_out_as(p, eight_bit_zeros(shard, key, qmaps))
            eight_bit: Any = local(moment)
            eight_bit.qmap = qmaps.get(is_signed(key), shard.device)
            eight_bit.copy_(local(value).float().contiguous())
            state[key] = moment


def is_signed(key: str) -> bool:
    """Return whether the codes of a moment stand for signed values.

    The second moment is never negative; an unsigned map gives it twice the resolution.
    """
    return key != "exp_avg_sq"


def eight_bit_zeros(shard: Tensor, key: str, qmaps: QuantizationMaps) -> Any:
    """Return a quantized moment, all 0, for the local shard of a parameter."""
    codes = torch.zeros(shard.shape, dtype=torch.uint8, device=shard.device)
    scale = torch.zeros(shard.numel() // BLOCK_SIZE, dtype=torch.float32, device=shard.device)
    signed = is_signed(key)
    qmap = qmaps.get(signed, shard.device)
    return import_eight_bit_tensor()(codes, scale, qmap, signed, dtype=torch.float32)


def plain_state_dict(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with quantized tensors replaced by dicts of plain ones, except in DTensors.

    Lightning loads checkpoints with a function as ``map_location``, which torch supports for plain tensors
    only.
    """
    return _map_state(saved, _to_plain)


def eight_bit_state_dict(saved: Mapping[str, Any], *, in_floats: bool = False) -> dict[str, Any]:
    """Undo :func:`plain_state_dict`.

    Args:
        saved: A state dict, whose state may hold other mappings too.
        in_floats: Whether to return dequantized tensors, which does not need torchao.
    """
    return _map_state(saved, _to_floats if in_floats else _from_plain)


def dequantize(codes: Tensor, qmap: Tensor, scale: Tensor, block_size: int) -> Tensor:
    """Return ``qmap[codes]``, times the scale of the block, in the shape of the codes.

    Args:
        codes: Indices into ``qmap``, of any shape.
        qmap: The quantization map, shape ``(256,)``.
        scale: The absolute maximum of each block of consecutive elements, shape ``(blocks,)``.
        block_size: Elements of a block; the last may be shorter.
    """
    scales = scale.repeat_interleave(block_size)[: codes.numel()]
    return (qmap[codes.reshape(-1).long()] * scales).view(codes.shape)


def _map_state(saved: Mapping[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    state = {
        index: {key: function(value) for key, value in param_state.items()}
        if isinstance(param_state, Mapping)
        else param_state
        for index, param_state in saved["state"].items()
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
