"""Translates state dicts of ``torch.optim`` and of other LARS and LAMB implementations."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_lars.optim.state.torchao import dequantize

# Keys in the groups of torch.optim that select an implementation, or that have another meaning here (AdamW's
# decoupled_weight_decay).
_IGNORED_OPTIONS = ("foreach", "fused", "capturable", "differentiable", "amsgrad", "decoupled_weight_decay")

_RENAMED_OPTIONS = {
    "trust_coeff": "trust_coefficient",  # timm
    "eta": "trust_coefficient",  # minerva, solo-learn, Barlow Twins
    "epsilon": "eps",  # minerva
    "decoupled_decay": "decoupled_weight_decay",  # timm
    "weight_decouple": "decoupled_weight_decay",  # pytorch_optimizer
}

_RENAMED_STATE = {"mu": "momentum_buffer"}  # Barlow Twins, MoCo v3, MAE

# State that other packages store only for inspection.
_DIAGNOSTIC_KEYS = ("weight_norm", "adam_norm", "trust_ratio", "unorm_vec")

# Options of LAMB in timm and pytorch_optimizer that LAMB does not have here.
_UNSUPPORTED_OPTIONS = ("caution", "corrected_weight_decay", "rectify", "fixed_decay", "adanorm")

# Keys in the groups of lightly, torch_optimizer and lightning-bolts, which share one implementation of LARS.
_BOLTS_GROUP_KEYS = {"lr", "momentum", "dampening", "weight_decay", "nesterov", "trust_coefficient", "eps"}

_BITSANDBYTES_STATE_KEY = "__bnb_optimizer_quant_state__"
_BLOCK_SIZES = (256, 2048)  # of bitsandbytes, in newer and in older versions

# Keys in every group of torch.optim.
_TORCH_GROUP_KEYS = {"foreach", "maximize", "differentiable", "fused"}


class Translation(NamedTuple):
    """A state dict with the keys of LARS and LAMB, and findings about its origin."""

    saved: dict[str, Any]

    unscaled: dict[Any, str]
    """By parameter number, the evidence that its momentum or learning rate is without trust ratios."""

    without_counterpart: list[str]
    """Options that are enabled and not supported here."""


def translate(saved: Mapping[str, Any]) -> Translation:
    """Rename the keys of other packages; keep keys of this package and unknown ones."""
    groups, state = [], dict(saved["state"])
    unscaled: dict[Any, str] = {}
    without_counterpart: list[str] = []
    for group in saved["param_groups"]:
        if is_own(group):
            groups.append(group)
            continue
        states = {number: _flat(state[number]) for number in group["params"] if state.get(number)}
        reason = _why_unscaled(group, list(states.values()))
        if reason is not None:
            unscaled.update(dict.fromkeys(group["params"], reason))
        without_counterpart += [key for key in _UNSUPPORTED_OPTIONS if group.get(key)]
        for number, param_state in states.items():
            state[number] = _translate_state(param_state, group)
        groups.append(_translate_group(group, list(states.values())))
    return Translation({**saved, "state": state, "param_groups": groups}, unscaled, without_counterpart)


def is_own(group: Mapping[str, Any]) -> bool:
    """Return whether a group is from an optimizer of this package."""
    return "layer_adaptation" in group


def _translate_group(group: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    options = {
        _RENAMED_OPTIONS.get(key, key): value for key, value in group.items() if key not in _IGNORED_OPTIONS
    }
    if any(map(_is_lars_of_bitsandbytes, states)):
        options["momentum"] = options.pop("betas")[0]  # its groups have a dampening too, without effect
    if isinstance(options.get("trust_clip"), bool):  # timm's
        clip: object = "larc" if "momentum" in options else 1.0
        options["trust_clip"] = clip if options["trust_clip"] else None
    if options.get("max_grad_norm") == 0:  # apex: no clipping
        options["max_grad_norm"] = None
    if "weight_decouple" in group:
        # pytorch_optimizer clips only with pre_norm=True, which its groups do not contain.
        options.pop("max_grad_norm", None)
    return options


def _translate_state(state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    if _is_lars_of_bitsandbytes(state):
        state = _translate_bitsandbytes(state, "momentum_buffer")
    elif {"state1", "state2"} <= state.keys():
        state = _translate_bitsandbytes(state, "exp_avg", "exp_avg_sq")
    translated = {
        _RENAMED_STATE.get(key, key): value for key, value in state.items() if key not in _DIAGNOSTIC_KEYS
    }
    if "exp_avg" in translated and "step" in group:  # timm, apex and pytorch_optimizer
        translated.setdefault("step", group["step"])
    return translated


def _flat(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state without the nesting of bitsandbytes."""
    nested = state.get(_BITSANDBYTES_STATE_KEY)
    if not isinstance(nested, Mapping):
        return state
    return {**{key: value for key, value in state.items() if key != _BITSANDBYTES_STATE_KEY}, **nested}


def _is_lars_of_bitsandbytes(state: Mapping[str, Any]) -> bool:
    # In its other optimizers with one state tensor, that may be a first or a second moment.
    return {"state1", "unorm_vec"} <= state.keys() and "state2" not in state


def _translate_bitsandbytes(state: Mapping[str, Any], *names: str) -> dict[str, Any]:
    counted = "step" in state and "exp_avg" in names
    translated: dict[str, Any] = {"step": state["step"]} if counted else {}
    keys = ("state", "qmap", "absmax")
    for number, name in enumerate(names, 1):
        translated[name] = _dequantize(*(state.get(f"{key}{number}") for key in keys))
    known = {"step", *(f"{key}{number}" for key in keys for number in (1, 2))}
    return {**translated, **{key: value for key, value in state.items() if key not in known}}


def _dequantize(codes: Any, qmap: Any, absmax: Any) -> Any:
    """Dequantize block-wise codes, each of which is relative to the largest value of its block."""
    if qmap is None or absmax is None:
        return codes
    sizes = [size for size in _BLOCK_SIZES if -(-codes.numel() // size) == absmax.numel()]
    if not sizes:
        raise ValueError(
            f"state_dict must hold a scale for each block of {' or '.join(map(str, _BLOCK_SIZES))} codes, as "
            f"bitsandbytes' do, got {absmax.numel()} for {codes.numel()}"
        )
    return dequantize(codes, qmap, absmax, sizes[0])


def _why_unscaled(group: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the evidence that momentum (LARS) or learning rate (LAMB) is without trust ratios, or None."""
    if any(map(_is_lars_of_bitsandbytes, states)) or "max_unorm" in group:
        return (
            "The state dict is from bitsandbytes' LARS, which scales the update, not the input of the "
            'momentum (as denominator="momentum" does here)'
        )
    if "betas" in group:
        is_lamb = {"grad_averaging", "always_adapt"} & group.keys() or any(
            {"trust_ratio", "unorm_vec"} & {**state, **state.get(_BITSANDBYTES_STATE_KEY, {})}.keys()
            for state in states
        )
        named = "is from AdamW" if group.get("decoupled_weight_decay") else "has no option of LAMB"
        return None if is_lamb else f"The state dict {named}"
    options = {_RENAMED_OPTIONS.get(key, key) for key in group}
    if "trust_coefficient" not in options:
        named = "is from SGD" if group.keys() >= _TORCH_GROUP_KEYS else "has no trust coefficient, like SGD's"
        return f"The state dict {named}"
    copies = group.keys() - {"params", "param_names", "name", "initial_lr"} == _BOLTS_GROUP_KEYS
    if group.get("weight_decay") == 0 and (copies or group.get("always_adapt") is False):
        peers = "lightly, torch_optimizer and lightning-bolts do" if copies else "timm does"
        return f"The state dict has a group with weight_decay=0, which {peers} not adapt"
    return None
