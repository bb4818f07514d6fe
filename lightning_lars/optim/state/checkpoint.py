"""State dicts, of these optimizers and of torch.optim's, made to fit."""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_lars.optim.parameters import named_params
from lightning_lars.optim.state.foreign import is_own, translate
from lightning_lars.optim.state.group_matching import match_groups
from lightning_lars.optim.state.name_matching import quote
from lightning_lars.optim.state.torchao import eight_bit_state_dict


def adapt_state_dict(
    saved: Mapping[str, Any],
    own_groups: Sequence[Mapping[str, Any]],
    state_keys: Set[str],
    moments: Collection[str],
    check_groups: Callable[[Sequence[Mapping[str, Any]]], None],
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Return a state dict whose groups are those of the optimizer and have every key.

    Hyperparameters that it does not name, and ``fused``, get the value that they have in the optimizer.

    Args:
        saved: A state dict of LARS or LAMB, of ``torch.optim``, or of another package.
        own_groups: Of the optimizer.
        state_keys: What the optimizer keeps for each layer.
        moments: What of that is of the size of the layer.
        check_groups: Raises if the hyperparameters of groups break a rule.
        warn: Called with what the user should know of.

    Raises:
        ValueError: If groups, hyperparameters or state do not fit the optimizer.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        got = list(saved) if isinstance(saved, Mapping) else saved
        raise ValueError(
            f'state_dict must be that of an optimizer, with "state" and "param_groups", got {got!r}: in a '
            'checkpoint of Lightning, it is one of checkpoint["optimizer_states"]'
        )
    saved, unscaled, without_counterpart = translate(
        eight_bit_state_dict(saved, in_floats="min_8bit_size" not in own_groups[0])
    )
    groups = match_groups(saved["param_groups"], own_groups, warn)
    _warn_of_unscaled(groups, own_groups, saved["state"], unscaled, warn)
    if without_counterpart:
        warn(f"{without_counterpart[0]}=True in the state dict has no counterpart here, and ends with it")
    groups = [_complete(group, own, saved["state"]) for group, own in zip(groups, own_groups, strict=True)]
    check_groups(groups)
    names = (name for name, _ in named_params(own_groups))
    for name, (number, p) in zip(names, pair_params(groups, own_groups), strict=True):
        _check_state(saved["state"].get(number) or {}, name, p, state_keys, moments)
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


def is_checkpoint_dry_run() -> bool:
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


def _check_state(
    state: Mapping[str, Any], name: str, p: Tensor, state_keys: Set[str], moments: Collection[str]
) -> None:
    if not state:
        return
    if state.keys() != state_keys:
        unknown = sorted(state.keys() - state_keys)
        way_out = "it was saved by another optimizer" if unknown else "it is incomplete"
        if state.keys() > state_keys:
            way_out += f". Delete {quote(unknown)} from its state to go on without"
        raise ValueError(
            f"state_dict must hold {sorted(state_keys)} for parameter {name!r}, got {sorted(state)}: "
            f"{way_out}"
        )
    for key, value in state.items():
        if key == "step" or value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(
                f"state_dict must hold a tensor for {key!r} of parameter {name!r}, got {value!r}"
            )
        if key not in moments:
            if value.numel() != 1:
                raise ValueError(
                    f"state_dict must hold one number for {key!r} of parameter {name!r}, got a tensor of "
                    f"shape {tuple(value.shape)}: it was saved by another optimizer"
                )
            continue
        if value.shape != p.shape:
            raise ValueError(
                f"state_dict must hold {key!r} of {name!r} in the shape of the parameter, {tuple(p.shape)}, "
                f"got {tuple(value.shape)}. Without names on both sides, the order must be the same; what "
                "FSDP saved is put in shape by FullyShardedDataParallel.optim_state_dict_to_load()"
            )
        if _layout(value) != _layout(p):
            raise ValueError(
                f"state_dict must hold {key!r} of {name!r} in the layout of its parameter {_layout(p)}, got "
                f"{_layout(value)}: torch.distributed.checkpoint.state_dict.set_optimizer_state_dict() "
                "divides it among the processes"
            )


def _warn_of_unscaled(
    groups: Sequence[Mapping[str, Any]],
    own_groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Any],
    unscaled: Mapping[Any, str],
    warn: Callable[[str], None],
) -> None:
    """Warn of the first group that was not adapted, and now is."""
    for group, own in zip(groups, own_groups, strict=True):
        reason = next((unscaled[number] for number in group["params"] if number in unscaled), None)
        if reason is None or not own["layer_adaptation"] or own.get("denominator") == "momentum":
            continue
        if "betas" in own:
            warn(
                f"{reason}: it brings the learning rate of an optimizer without trust ratios, "
                f"{float(group['lr']):g} in the place of {float(own['lr']):g}. A good one for LAMB is "
                "another, often a larger one: set it after loading, in param_groups"
            )
            return
        buffers = [(state.get(number) or {}).get("momentum_buffer") for number in group["params"]]
        if any(buffer is not None for buffer in buffers):
            warn(
                f"{reason}: it brings a learning rate, and a momentum that no trust ratio has scaled (unless "
                "a wrapper did, as LARC). Under a rate for LARS it would throw the weights far off until it "
                "has faded. Raise lr in small steps, or leave the momentum behind with "
                'state_dict["state"] = {}'
            )
            return


def _complete(group: Mapping[str, Any], own: Mapping[str, Any], state: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a group with the hyperparameters that it names, and the optimizer's others."""
    for key in {"momentum", "betas"} & own.keys():
        if key not in group:
            keys = {key for number in group["params"] for key in state.get(number) or {}}
            takers = {"exp_avg": " LAMB takes its moments", "momentum_buffer": " LARS takes its momentum"}
            raise ValueError(
                f"state_dict must have {key!r} in its groups, got {sorted(group)}: was it saved by another "
                f"optimizer?{''.join(takers[each] for each in takers if each in keys)}"
            )
    kept = {key: value for key, value in own.items() if key not in ("params", "param_names")}
    if not is_own(group):
        group = {key: value for key, value in group.items() if key in own}
    elif "min_8bit_size" not in own:
        group = {key: value for key, value in group.items() if key != "min_8bit_size"}
    return {**kept, **group}


def _layout(tensor: Tensor) -> object:
    """Return how a DTensor is divided, ``"plain"`` for a tensor that is not."""
    return getattr(tensor, "placements", "plain")
