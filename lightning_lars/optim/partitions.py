"""Refusals of optimizers that were given layers but hold something else, whose norms would be wrong."""

import gc
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_lars.optim.parameters import named_params


def given_shapes(params: Iterable[Tensor]) -> set[tuple[int, ...] | None]:
    """Return the shapes of the parameters, None for one that is not known yet (a lazy layer)."""
    return {None if is_lazy(p) else tuple(p.shape) for p in params}


def check_not_partitioned(
    groups: Sequence[Mapping[str, Any]],
    shards: Mapping[Tensor, object],
    given: Set[tuple[int, ...] | None],
) -> None:
    """Raise RuntimeError if a parameter has a shape that none had that the optimizer was given.

    So it does if a group has not as many parameters as names.

    DeepSpeed ZeRO puts one flat tensor in the place of all layers of a group. FSDP changes shapes too, and
    is known by its marks.
    """
    if None in given:
        return
    is_other = any(len(group.get("param_names", group["params"])) != len(group["params"]) for group in groups)
    for name, p in named_params(groups):
        if is_other or (p not in shards and tuple(p.shape) not in given):
            raise RuntimeError(
                f"parameter {name!r} of shape {tuple(p.shape)} is no layer that the optimizer was "
                "given: something has repartitioned the layers, as DeepSpeed ZeRO stages 1 to 3 do, and "
                "their norms are lost. Use ZeRO stage 0, FSDP (use_orig_params=True), fully_shard "
                "(ModelParallelStrategy), or DDP with ZeroRedundancyOptimizer"
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
