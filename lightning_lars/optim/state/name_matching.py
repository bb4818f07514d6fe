"""Matches the parameters of a state dict to an optimizer's by name."""

from collections.abc import Mapping, Sequence
from typing import Any

# What DDP, torch.compile, FSDP1, activation checkpointing and Fabric insert into the names of parameters.
# Submodules may be called "module" too: these parts are ignored only if the full names do not match.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}

Groups = Sequence[Mapping[str, Any]]
Names = Sequence[str | None]


def order_by_name(saved: Names, own: Names) -> list[int] | None:
    """Return for each parameter of the optimizer its position in the state dict.

    Names are compared in full, then without the parts that wrappers insert, then with a common prefix added
    on one side.

    Args:
        saved: Names of the parameters in the state dict, None for a parameter without a name.
        own: Names of the parameters of the optimizer.

    Returns:
        The positions, or None if the names do not match.

    Example:
        >>> from lightning_lars.optim.state.name_matching import order_by_name
        >>> order_by_name(["b.weight", "a.weight"], ["module.a.weight", "module.b.weight"])
        [1, 0]
        >>> order_by_name(["weight", "bias"], ["model.weight", "model.bias"])
        [0, 1]
        >>> order_by_name(["encoder.weight"], ["decoder.weight"]) is None
        True
    """
    given, held = [name for name in saved if name], [name for name in own if name]
    if len(given) < len(saved) or len(held) < len(own) or len(saved) != len(own):
        return None
    bare, bare_held = list(map(_bare, given)), list(map(_bare, held))
    prefix, prefix_held = _prefix(bare_held, bare), _prefix(bare, bare_held)
    for left, right in (
        (given, held),
        (bare, bare_held),
        ([prefix + name for name in bare], bare_held),
        (bare, [prefix_held + name for name in bare_held]),
    ):
        place = {name: index for index, name in enumerate(left)}
        if len(place) == len(left) and place.keys() == set(right):
            return [place[name] for name in right]
    return None


def may_match(saved: str | None, own: str | None) -> bool:
    """Return whether names allow two parameters to be the same; numbers stand for missing names."""
    if saved is None or own is None or saved.isdigit() or own.isdigit():
        return True
    return _bare(saved) == _bare(own)


def names_of(groups: Groups) -> list[str | None]:
    """Return the names of the parameters in groups, None for a parameter without a name."""
    names: list[str | None] = []
    for group in groups:
        given = group.get("param_names")
        if are_names([group]):
            given = group["params"]  # param_names are in the order of the optimizer that was saved
        # A group whose parameters were replaced may have names left from before.
        if given is None or len(given) != len(group["params"]):
            given = [None] * len(group["params"])
        names += given
    return names


def are_names(groups: Groups) -> bool:
    """Return whether parameters are identified by name, as in ``torch.distributed.checkpoint``."""
    return any(isinstance(number, str) for group in groups for number in group["params"])


def describe_differences(saved: Names, own: Names) -> str:
    """Describe, for an error message, the names that only one side has."""
    if None in saved or None in own:
        return ""
    missing = [name for name in own if name not in saved]
    unknown = [name for name in saved if name not in own]
    parts = [f"does not have {quote(missing)}"] if missing else []
    parts += [f"has {quote(unknown)}, which the optimizer does not have"] if unknown else []
    return "it " + ", and ".join(parts) if parts else ""


def quote(names: Sequence[object]) -> str:
    """Quote names for an error message, only the first few of many.

    Example:
        >>> from lightning_lars.optim.state.name_matching import quote
        >>> quote(["a", "b"]), quote(range(9))
        ("'a', 'b'", '0, 1, 2, 3, 4 and 4 more')
    """
    first = ", ".join(map(repr, names[:5]))
    return first if len(names) <= 5 else f"{first} and {len(names) - 5} more"


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefix(longer: Sequence[str], shorter: Sequence[str]) -> str:
    """Return the common prefix that turns the shorter names into the longer ones, if there is one."""
    if not shorter:
        return ""
    ending = f".{shorter[0]}"
    prefixes = [name.removesuffix(shorter[0]) for name in longer if name.endswith(ending)]
    names = set(longer)
    return next((prefix for prefix in prefixes if {prefix + name for name in shorter} == names), "")
