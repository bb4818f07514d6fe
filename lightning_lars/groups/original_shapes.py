"""The shapes that parameters had before a strategy flattened and sharded them."""

from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor, nn
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel
from torch.nn.parameter import is_lazy


def sharded_shapes(module: nn.Module) -> dict[Tensor, Size]:
    """Return the original shapes of the parameters that FSDP1 has flattened and sharded.

    Parameters outside any wrapper within the module belong to the one around it, which a LightningModule
    reaches through ``trainer.model``.
    """
    shapes: dict[Tensor, Size] = {}
    for root in {module, _model_of_trainer(module)}:
        for each in root.modules():
            # Only its handle knows the shapes, and has no public name.
            handle: Any = getattr(each, "_handle", None) if _is_fsdp1(each) else None
            if handle is not None:
                flat = handle.flat_param
                shapes.update(zip(flat._params or (), flat._shapes, strict=False))
    return shapes


def original_shape(parameter: Tensor, shapes: Mapping[Tensor, Size]) -> Size | None:
    """Return the shape of a whole layer; None where it is unknown.

    Args:
        parameter: A parameter, or the shard that has replaced it. A DTensor has the global shape.
        shapes: The result of :func:`sharded_shapes`.
    """
    if parameter in shapes:
        return Size(shapes[parameter])
    # Set by DeepSpeed ZeRO stage 3, which leaves an empty tensor.
    if hasattr(parameter, "ds_shape"):
        return Size(parameter.ds_shape)
    # FSDP1 marks views of a flat parameter.
    if is_lazy(parameter) or is_flat(parameter) or getattr(parameter, "_fsdp_flattened", False):
        return None
    return parameter.shape


def is_flat(parameter: Tensor) -> bool:
    """Return whether FSDP1, torch's or fairscale's, has flattened many layers into this parameter."""
    return isinstance(parameter, FlatParameter) or type(parameter).__name__ == "FlatParameter"


def _is_fsdp1(module: nn.Module) -> bool:
    return isinstance(module, FullyShardedDataParallel)


def _model_of_trainer(module: nn.Module) -> nn.Module:
    try:
        model = getattr(getattr(module, "trainer", None), "model", None)
    except RuntimeError:  # a LightningModule that is not attached to a Trainer
        model = None
    return model if isinstance(model, nn.Module) else module
