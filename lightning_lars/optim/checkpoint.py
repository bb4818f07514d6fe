"""State dicts, of these optimizers and of torch.optim's, made to fit."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_lars.optim.eight_bit_state import eight_bit_state_dict
from lightning_lars.optim.group_matching import match_groups

# torch.optim keeps these in its groups: a choice of implementation, or (AdamW's decoupled decay) a name
# that means something else here. A checkpoint of theirs must not switch ours.
_FOREIGN_KEYS = ("foreach", "fused", "capturable", "differentiable", "amsgrad", "decoupled_weight_decay")


def adapt_state_dict(
    saved: dict[str, Any],
    own_groups: Sequence[Mapping[str, Any]],
    state_keys: Set[str],
    check_groups: Callable[[Sequence[Mapping[str, Any]]], None],
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Return a state dict whose groups have every key, or raise before anything is loaded.

    Hyperparameters that it does not name, and ``fused``, get the value that they have in the optimizer.

    Raises:
        ValueError: If groups, hyperparameters or state do not fit the optimizer.
    """
    saved = eight_bit_state_dict(saved)
    groups = match_groups(saved["param_groups"], own_groups, warn)
    _warn_of_momentum(groups, own_groups, saved["state"], warn)
    groups = [_adapt_group(group, own) for group, own in zip(groups, own_groups, strict=True)]
    check_groups(groups)
    for saved_id, p in pair_params(groups, own_groups):
        state = saved["state"].get(saved_id, {})
        if state and state.keys() != state_keys:
            raise ValueError(
                f"state_dict must hold {sorted(state_keys)} for a parameter, got {sorted(state)}: "
                "it is another optimizer's"
            )
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step" and value.shape != p.shape:
                raise ValueError(
                    f"state_dict must hold {key!r} in the shape of its parameter {tuple(p.shape)}, "
                    f"got {tuple(value.shape)}: it is another module's, or FSDP's, of which "
                    "FullyShardedDataParallel.optim_state_dict_to_load() makes what fits"
                )
            if isinstance(value, Tensor) and key != "step" and _layout(value) != _layout(p):
                raise ValueError(
                    f"state_dict must hold {key!r} in the layout of its parameter {_layout(p)}, got "
                    f"{_layout(value)}: torch.distributed.checkpoint.state_dict.set_optimizer_state_dict() "
                    "divides it among the processes"
                )
    return {**saved, "param_groups": groups}


def restore_dtypes(
    state: dict[Tensor, Any], saved: Mapping[str, Any], own_groups: Sequence[Mapping[str, Any]]
) -> None:
    """Put the saved state back in float32 or wider, on the device of its parameter.

    torch has cast it to the dtype of the parameter, and left ``step`` where it was.
    """
    for saved_id, p in pair_params(saved["param_groups"], own_groups):
        dtype = torch.promote_types(p.dtype, torch.float32)
        for key, value in saved["state"].get(saved_id, {}).items():
            if key == "step":
                state[p][key] = torch.as_tensor(value, dtype=torch.float32, device=p.device).clone()
            elif isinstance(value, Tensor):
                state[p][key] = value.to(p.device, dtype, copy=True)


def is_trial_of_checkpoint() -> bool:
    """Tell whether ``torch.distributed.checkpoint`` makes a step only to see what state there will be.

    It does, with a learning rate and gradients of 0, to save an optimizer that has not begun, and to load
    into one. The weights stay, but state would begin: a momentum of weight decay alone, and a count of one
    step.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    # It has no public name, and nothing else tells it from a first step with a learning rate of 0.
    trial = getattr(module, "_init_optim_state", None)
    if trial is None or torch.compiler.is_compiling():
        return False
    frame = sys._getframe()
    while frame is not None and frame.f_code is not trial.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def pair_params(
    saved_groups: Iterable[Mapping[str, Any]], own_groups: Iterable[Mapping[str, Any]]
) -> Iterable[tuple[Any, Tensor]]:
    """Pair the parameters' numbers in a state dict with the parameters."""
    saved_ids = chain.from_iterable(group["params"] for group in saved_groups)
    return zip(saved_ids, chain.from_iterable(group["params"] for group in own_groups), strict=True)


def _layout(tensor: Tensor) -> object:
    """Return how a DTensor is divided, ``"plain"`` for a tensor that is not."""
    return getattr(tensor, "placements", "plain")


def _is_foreign(saved: Mapping[str, Any]) -> bool:
    return "trust_clip" not in saved  # which only LARS and LAMB have


def _warn_of_momentum(
    groups: Sequence[Mapping[str, Any]],
    own_groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Any],
    warn: Callable[[str], None],
) -> None:
    for group, own in zip(groups, own_groups, strict=True):
        scales_momentum = own["layer_adaptation"] and own.get("denominator") not in (None, "momentum")
        buffers = [state.get(saved_id, {}).get("momentum_buffer") for saved_id in group["params"]]
        if _is_foreign(group) and scales_momentum and any(buffer is not None for buffer in buffers):
            warn(
                "The state dict is SGD's, with its learning rate, and a momentum that no trust ratio has "
                "scaled: under a rate for LARS it would throw the weights far off until it has faded. Raise "
                'lr in small steps, or leave the momentum behind with state_dict["state"] = {}',
            )
            return


def _adapt_group(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    if _is_foreign(saved):
        for key in {"momentum", "betas"} & own.keys():
            if key not in saved:
                raise ValueError(
                    f"state_dict must have {key!r} in its groups, got {sorted(saved)}: "
                    "it is another optimizer's"
                )
        saved = {key: value for key, value in saved.items() if key in own and key not in _FOREIGN_KEYS}
    kept = {key: value for key, value in own.items() if key not in ("params", "param_names")}
    return {**kept, **saved}
