"""Refusals of optimizers that were given layers but hold something else, whose norms would be wrong."""

import gc
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer


def dimensions(params: Iterable[Tensor]) -> dict[Tensor, int | None]:
    """Return how many dimensions each parameter has, None for one that is not known yet (a lazy layer)."""
    return {p: None if isinstance(p, UninitializedParameter) else p.ndim for p in params}


def check_not_flattened(
    named: Sequence[tuple[str, Tensor]], shards: Mapping[Tensor, object], given: Mapping[Tensor, int | None]
) -> None:
    """Raise RuntimeError if flat tensors stand in the place of the layers that the optimizer was given.

    So DeepSpeed ZeRO does: a group holds one flat tensor, or none, for all its layers. Layers that come and
    go one by one (pruning, growing, fine-tuning) leave others in place, or have dimensions. FSDP flattens
    too, and is known by its marks.

    Args:
        named: What the optimizer holds now, with names.
        shards: The parameters that a strategy has marked as its own.
        given: The layers that it held when it was built or last stepped, and their dimensions then.
    """
    now = dimensions(p for _, p in named)
    if not now or any(p in given or p in shards or ndim != 1 for p, ndim in now.items()):
        return
    if len(given) > len(named) or any(ndim != 1 for ndim in given.values()):
        name, p = named[0]
        raise RuntimeError(
            f"parameter {name!r} of shape {tuple(p.shape)} is no layer that the optimizer was given: flat "
            f"tensors, {len(named)} in all, have taken the place of {len(given)} layers, whose norms are "
            "lost. DeepSpeed does that: use its ZeRO stage 0, FSDP (use_orig_params=True), fully_shard "
            "(ModelParallelStrategy), or DDP with ZeroRedundancyOptimizer. Vectors of your own are layers if "
            "they come by add_param_group()"
        )


def check_sees_all_gradients(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise RuntimeError if ``max_grad_norm`` would bound the gradients of a part of the layers.

    ZeroRedundancyOptimizer gives each process some of the layers: the trust ratios of these are right, a
    norm over all gradients is not to be had.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    max_grad_norm = groups[0]["max_grad_norm"]
    if module is None or max_grad_norm is None or torch.compiler.is_compiling():
        return
    # The inner optimizer does not know its owner.
    for candidate in gc.get_objects():
        if issubclass(type(candidate), module.ZeroRedundancyOptimizer) and candidate.optim is optimizer:
            raise RuntimeError(
                f"max_grad_norm must be None inside ZeroRedundancyOptimizer, got {max_grad_norm!r}: "
                "each process steps some of the layers and cannot see the gradients of the others. Clip "
                "before the step: Trainer(gradient_clip_val=...) or torch.nn.utils.clip_grad_norm_"
            )
