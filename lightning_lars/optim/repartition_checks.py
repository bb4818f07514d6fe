"""Checks that the parameters were not repartitioned after construction, which would make norms wrong."""

import gc
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lightning_lars.rules import counted


def dimensions(params: Iterable[Tensor]) -> dict[Tensor, int | None]:
    """Return the number of dimensions of each parameter, None while it is unknown (lazy modules)."""
    return {p: None if isinstance(p, UninitializedParameter) else p.ndim for p in params}


def check_not_flattened(
    named: Sequence[tuple[str, Tensor]], shards: Mapping[Tensor, object], given: Mapping[Tensor, int | None]
) -> None:
    """Raise RuntimeError if flat tensors have replaced the layers that the optimizer was built with.

    DeepSpeed ZeRO does this: a group then holds one flat tensor, or none, for all its layers. Pruning,
    growing and fine-tuning replace single layers and leave others in place, or add layers with more than one
    dimension. The flat parameters of FSDP are recognized by their attributes.

    Args:
        named: The current parameters, with names.
        shards: The parameters that are known to be sharded.
        given: The parameters at construction or at the last step, and their numbers of dimensions.
    """
    now = dimensions(p for _, p in named)
    if not now or any(p in given or p in shards or ndim != 1 for p, ndim in now.items()):
        return
    if len(given) > len(named) or any(ndim != 1 for ndim in given.values()):
        name, p = named[0]
        raise RuntimeError(
            f"parameter {name!r} of shape {tuple(p.shape)} is not a layer that the optimizer was given: flat "
            f"tensors ({len(named)}) have replaced its {counted(len(given), 'layer')}, whose norms can no "
            "longer be computed. DeepSpeed does this: use its ZeRO stage 0, FSDP (use_orig_params=True), "
            "fully_shard (ModelParallelStrategy), or DDP with ZeroRedundancyOptimizer. To optimize vectors "
            "of your own, add them with add_param_group()"
        )


def check_sees_all_gradients(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise RuntimeError if ``max_grad_norm`` would bound the norm of only some of the gradients.

    ZeroRedundancyOptimizer partitions the layers among ranks: each rank computes correct trust ratios of its
    layers, but not the norm of all gradients.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    max_grad_norm = groups[0]["max_grad_norm"]
    if module is None or max_grad_norm is None or torch.compiler.is_compiling():
        return
    # The inner optimizer has no reference to its wrapper.
    for candidate in gc.get_objects():
        if issubclass(type(candidate), module.ZeroRedundancyOptimizer) and candidate.optim is optimizer:
            raise RuntimeError(
                f"max_grad_norm must be None inside ZeroRedundancyOptimizer, got {max_grad_norm!r}: "
                "each rank updates some of the layers and does not see the gradients of the others. "
                "Clip before the step: Trainer(gradient_clip_val=...) or torch.nn.utils.clip_grad_norm_"
            )
