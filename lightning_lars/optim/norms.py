"""The norm of every layer, whole, accumulated in at least float32."""

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]
"""One tensor per layer."""


def layer_norms(tensors: Tensors) -> Tensor:
    """Return the L2 norm of every tensor without leaving the device.

    Args:
        tensors: One tensor per layer, of any shapes, all on one device and of one dtype.

    Returns:
        Norms of shape ``(layers,)`` on that device, in the dtype they were summed in.

    Example:
        >>> import torch
        >>> from lightning_lars.optim.norms import layer_norms
        >>> layer_norms([torch.tensor([[3.0, 4.0]]), torch.tensor(2.0)])
        tensor([5., 2.], dtype=torch.float64)
    """
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=accumulation_dtype(tensors[0])))


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which to add up a tensor.

    float64 on the CPU, where a float32 sum of ten million squares is off by up to a percent; elsewhere
    float32, whose sums are exact enough there, or float64 for float64 tensors.
    """
    on_cpu = tensor.device.type == "cpu"
    return torch.promote_types(tensor.dtype, torch.float64 if on_cpu else torch.float32)


def is_sharded(parameter: Tensor) -> bool:
    """Tell whether a parameter holds (or is laid out as) a part of a layer.

    Covers DTensor (FSDP2, tensor parallel) and both layouts of FSDP1, whose marks have no public name.
    """
    return (
        hasattr(parameter, "device_mesh")
        or getattr(parameter, "_fsdp_flattened", False)
        or getattr(parameter, "_is_flat_param", False)
    )
