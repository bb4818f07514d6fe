"""Adapts state dicts of these optimizers, of ``torch.optim`` and of other packages for loading."""

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
    """Return a state dict that has the groups of the optimizer, with all keys.

    Hyperparameters that the state dict does not have, and ``fused``, keep the optimizer's values.

    Args:
        saved: A state dict of LARS or LAMB, of ``torch.optim``, or of another package.
        own_groups: The groups of the optimizer.
        state_keys: The keys of a layer's state.
        moments: The state keys whose tensors have the shape of the layer.
        check_groups: Raises if a hyperparameter breaks its rule.
        warn: Called with the text of each warning.

    Raises:
        ValueError: If groups, hyperparameters or state do not fit the optimizer.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        got = list(saved) if isinstance(saved, Mapping) else saved
        raise ValueError(
            f'state_dict must be an optimizer state dict, with "state" and "param_groups", got {got!r}: in a '
            'Lightning checkpoint, use an element of checkpoint["optimizer_states"]'
        )
    saved = {**saved, "state": _without_duplicates(saved["state"])}
    saved, unscaled, without_counterpart = translate(
        eight_bit_state_dict(saved, in_floats="min_8bit_size" not in own_groups[0])
    )
    groups = match_groups(saved["param_groups"], own_groups, warn)
    _warn_of_unscaled(groups, own_groups, saved["state"], unscaled, warn)
    if without_counterpart:
        warn(f"{without_counterpart[0]}=True in the state dict is not supported here and is ignored")
    groups = [_complete(group, own, saved["state"]) for group, own in zip(groups, own_groups, strict=True)]
    check_groups(groups)
    names = (name for name, _ in named_params(own_groups))
    for name, (number, p) in zip(names, pair_params(groups, own_groups), strict=True):
        _check_state(saved["state"].get(number) or {}, name, p, state_keys, moments)
    return {**saved, "param_groups": groups}


def restore_dtypes(
    state: dict[Tensor, Any], saved: Mapping[str, Any], own_groups: Sequence[Mapping[str, Any]]
) -> None:
    """Restore the saved state in float32 or wider, on the device of its parameter.

    torch casts it to the dtype of the parameter, and does not move ``step``.
    """
    for saved_id, p in pair_params(saved["param_groups"], own_groups):
        dtype = torch.promote_types(p.dtype, torch.float32)
        for key, value in saved["state"].get(saved_id, {}).items():
            if key == "step":
                state[p][key] = torch.as_tensor(value, dtype=torch.float32, device=p.device).clone()
            elif isinstance(value, Tensor):
                state[p][key] = value.to(p.device, dtype, copy=True)


def is_checkpoint_dry_run() -> bool:
    """Return whether ``torch.distributed.checkpoint`` makes a step only to initialize the state.

    It does so, with a learning rate and gradients of 0, before it saves or loads an optimizer that has not
    stepped yet. The weights do not change, but the state would: weight decay in the momentum, and a count of
    one step.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    # A private function, but nothing else distinguishes this from a first step with a learning rate of 0.
    dry_run = getattr(module, "_init_optim_state", None)
    if dry_run is None or torch.compiler.is_compiling():
        return False
    frame = sys._getframe()
    while frame is not None and frame.f_code is not dry_run.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def pair_params(
    saved_groups: Iterable[Mapping[str, Any]], own_groups: Iterable[Mapping[str, Any]]
) -> Iterable[tuple[Any, Tensor]]:
    """Pair each parameter with its number in a state dict."""
    saved_ids = chain.from_iterable(group["params"] for group in saved_groups)
    return zip(saved_ids, chain.from_iterable(group["params"] for group in own_groups), strict=True)


def _without_duplicates(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Drop what ``torch.distributed.checkpoint`` adds to the state of parameter 0 as that of ``"0"``.

    It loads tensors in place, and everything else, which is the same there, under the number as text.
    """
    duplicates = {str(number) for number in state if isinstance(number, int)}
    return {key: value for key, value in state.items() if key not in duplicates}


def _check_state(
    state: Mapping[str, Any], name: str, p: Tensor, state_keys: Set[str], moments: Collection[str]
) -> None:
    if not state:
        return
    if state.keys() != state_keys:
        unknown = sorted(state.keys() - state_keys)
        remedy = "it was saved by a different optimizer" if unknown else "it is incomplete"
        if state.keys() > state_keys:
            remedy += f". Delete {quote(unknown)} from its state to load it without"
        raise ValueError(
            f"state_dict must hold {sorted(state_keys)} for parameter {name!r}, got {sorted(state)}: {remedy}"
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
                    f"shape {tuple(value.shape)}: it was saved by a different optimizer"
                )
            continue
        if value.shape != p.shape:
            raise ValueError(
                f"state_dict must hold {key!r} of {name!r} in the shape of the parameter, {tuple(p.shape)}, "
                f"got {tuple(value.shape)}. Without names on both sides, the order must be the same; convert "
                "FSDP state dicts with FullyShardedDataParallel.optim_state_dict_to_load()"
            )
        if _layout(value) != _layout(p):
            raise ValueError(
                f"state_dict must hold {key!r} of {name!r} in the layout of its parameter {_layout(p)}, got "
                f"{_layout(value)}: torch.distributed.checkpoint.state_dict.set_optimizer_state_dict() "
                "shards it"
            )


def _warn_of_unscaled(
    groups: Sequence[Mapping[str, Any]],
    own_groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Any],
    unscaled: Mapping[Any, str],
    warn: Callable[[str], None],
) -> None:
    """Warn of the first adapted group whose saved state was not adapted."""
    for group, own in zip(groups, own_groups, strict=True):
        reason = next((unscaled[number] for number in group["params"] if number in unscaled), None)
        if reason is None or not own["layer_adaptation"] or own.get("denominator") == "momentum":
            continue
        if "betas" in own:
            warn(
                f"{reason}: it replaces the learning rate {float(own['lr']):g} with one for an optimizer "
                f"without trust ratios, {float(group['lr']):g}. LAMB needs a different, often a larger one: "
                "set it in param_groups after loading"
            )
            return
        buffers = [(state.get(number) or {}).get("momentum_buffer") for number in group["params"]]
        if any(buffer is not None for buffer in buffers):
            warn(
                f"{reason}: its learning rate and momentum belong to updates without trust ratios (unless a "
                "wrapper such as LARC scaled them). At a learning rate for LARS, the momentum would move "
                "the weights far away before it decays. Increase lr in small steps, or discard it with "
                'state_dict["state"] = {}'
            )
            return


def _complete(group: Mapping[str, Any], own: Mapping[str, Any], state: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a saved group, completed with the optimizer's hyperparameters."""
    for key in {"momentum", "betas"} & own.keys():
        if key not in group:
            keys = {key for number in group["params"] for key in state.get(number) or {}}
            takers = {
                "exp_avg": " LAMB can load its moments",
                "momentum_buffer": " LARS can load its momentum",
            }
            raise ValueError(
                f"state_dict must have {key!r} in its groups, got {sorted(group)}: was it saved by a "
                f"different optimizer?{''.join(takers[each] for each in takers if each in keys)}"
            )
    kept = {key: value for key, value in own.items() if key not in ("params", "param_names")}
    if not is_own(group):
        group = {key: value for key, value in group.items() if key in own}
    elif "min_8bit_size" not in own:
        group = {key: value for key, value in group.items() if key != "min_8bit_size"}
    return {**kept, **group}


def _layout(tensor: Tensor) -> object:
    """Return the placements of a DTensor, ``"plain"`` for other tensors."""
    return getattr(tensor, "placements", "plain")
