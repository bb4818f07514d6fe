"""Decides which parameters are adapted, and by which rule the others are excluded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Size, nn
from torch.nn.parameter import is_lazy

from lightning_lars.groups.module_kinds import UNKNOWN, kinds_of
from lightning_lars.groups.no_weight_decay import is_marked, listed_in
from lightning_lars.groups.original_shapes import is_flat, original_shape, sharded_shapes
from lightning_lars.groups.parameter_names import aliases_of, closest, matches
from lightning_lars.groups.parameter_roles import NORMS, Place, named_norm, running_statistics
from lightning_lars.rules import FLAG

Predicate = Callable[[str, nn.Parameter, nn.Module], bool]
"""Called with the name of a parameter, the parameter, and the module that owns it."""

Exclusion = type[nn.Module] | Predicate | str
"""A module type, an fnmatch pattern over parameter names, or a predicate."""

DEFAULT_EXCLUDED: tuple[Exclusion, ...] = (*NORMS, named_norm, running_statistics)
"""The criteria for a normalization layer, which ``exclude_norm`` enables."""


class Layer(NamedTuple):
    """A parameter, the group that it belongs to if it is trained, and the rule that decided this."""

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    group: str
    rule: str
    shape: Size | None
    """Shape of the whole layer, where the parameter is a shard of it; None where it is unknown."""
    module: str
    """Class name of the owner, or of the module that it was scripted, traced or exported from."""


def classify(
    module: nn.Module,
    exclude: Exclusion | Iterable[Exclusion] = (),
    *,
    exclude_norm: bool = True,
    exclude_bias: bool = True,
    exclude_gain: bool = True,
    prefix: str = "",
    strict: bool = True,
) -> list[Layer]:
    """Classify every parameter, frozen ones included, as ``"adapted"`` or ``"excluded"``, with the reason.

    Takes the arguments of :func:`~lightning_lars.param_groups`. Unless ``strict``, a parameter whose shape
    or module is unknown stays adapted.

    Raises:
        ValueError: If a pattern matches no name, or a switch is no bool; or if a rule depends on the shape or
            the module of a trained parameter, and this is unknown.
        TypeError: If ``module`` is no module, or ``exclude`` holds an object of an unsupported type.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {module!r}: pass the model itself")
    check_switches(exclude_norm=exclude_norm, exclude_bias=exclude_bias, exclude_gain=exclude_gain)
    # Iterating a dict or bytes would yield keys or integers, not patterns.
    if isinstance(exclude, str | bytes | Mapping) or not isinstance(exclude, Iterable):
        exclude = [exclude]  # type: ignore[list-item]
    exclusions = list(exclude)
    aliases = aliases_of(module)
    _check_exclusions(exclusions, [alias.name for named in aliases.values() for alias in named], prefix)
    kinds, shapes, listed = kinds_of(module), sharded_shapes(module), listed_in(module)
    layers = []
    for parameter, named in aliases.items():
        places = [Place(alias, kinds[alias.owner]) for alias in named]
        shape = original_shape(parameter, shapes)
        # A tied parameter is excluded where any of its owners would exclude it.
        is_bias = any(place.is_bias(shape) for place in places)
        norm = next(filter(None, (place.norm() for place in places)), "")
        gains = [False] if is_bias or norm else [place.is_gain(shape) for place in places]
        if norm and exclude_norm:
            rule = norm
        elif is_bias and exclude_bias:
            rule = "bias"
        elif exclude_gain and all(gains):
            rule = "gain"
        elif is_marked(parameter) or any(each.holds(place.alias.name) for each in listed for place in places):
            rule = "no_weight_decay"
        else:
            rule = next(
                filter(None, (_own_rule(place, parameter, exclusions, prefix) for place in places)), ""
            )
        name, owner = prefix + named[0].name, named[0].holder
        if strict and parameter.requires_grad and not rule:
            asks_for_type = exclude_norm or exclude_gain
            if asks_for_type and not is_bias and any(place.kind == UNKNOWN for place in places):
                raise _unknown_module(name)
            if is_flat(parameter) and (asks_for_type or exclude_bias or exclusions):
                raise _flat(name)
            if exclude_gain and False not in gains and None in gains:
                raise _unknown_shape(name, parameter)
        group = "excluded" if rule else "adapted"
        layers.append(Layer(name, parameter, owner, group, rule, shape, kinds[owner].name or "(unknown)"))
    return layers


def check_switches(**switches: bool) -> None:
    """Raise ValueError unless every switch (``exclude_norm`` and the like) is True or False."""
    for argument, value in switches.items():
        FLAG.check(argument, value)


def _own_rule(place: Place, parameter: nn.Parameter, exclusions: Sequence[Exclusion], prefix: str) -> str:
    """Return the user's rule that excludes the parameter, as the user wrote it, or ""."""
    name, owner = place.alias.name, place.alias.owner
    for exclusion in exclusions:
        if isinstance(exclusion, str):
            if matches(name, exclusion, prefix):
                return repr(exclusion)
        elif isinstance(exclusion, type):
            if place.kind.is_a(exclusion) or isinstance(place.alias.holder, exclusion):
                return exclusion.__name__.removeprefix("_")
        elif exclusion(name, parameter, owner):
            return getattr(exclusion, "__name__", repr(exclusion))
    return ""


def _check_exclusions(exclusions: Iterable[Exclusion], names: list[str], prefix: str) -> None:
    for exclusion in exclusions:
        if isinstance(exclusion, str):
            if not any(matches(name, exclusion, prefix) for name in names):
                raise ValueError(
                    f"exclude must hold patterns that match a whole parameter name, got {exclusion!r}, which "
                    f"matches none: {closest(exclusion, names)}"
                )
        elif (
            not callable(exclusion)
            or isinstance(exclusion, nn.Module)
            or (isinstance(exclusion, type) and not issubclass(exclusion, nn.Module))
        ):
            raise TypeError(
                "exclude must hold module types, patterns over parameter names, or predicates "
                f"(name, parameter, owner) -> bool, got {exclusion!r}: to exclude one module, use its type "
                "or a pattern such as 'head.*'"
            )


def _unknown_module(name: str) -> ValueError:
    return ValueError(
        f"module must record which module owns each parameter, got {name!r} in a graph that does not: group "
        "the module that was traced or exported, and pass the names that are excluded there as exclude, with "
        "exclude_norm=False and exclude_gain=False"
    )


def _unknown_shape(name: str, parameter: nn.Parameter) -> ValueError:
    remedy = (
        "call this after a first forward, which initializes it"
        if is_lazy(parameter)
        else "FSDP has sharded it, and only the wrapper around this module knows its shape: pass that instead"
    )
    return ValueError(
        f"the shape of {name!r} must be known, because it decides whether this is a gain: {remedy}, or pass "
        "exclude_gain=False"
    )


def _flat(name: str) -> ValueError:
    return ValueError(
        f"module must have one parameter per layer, got {name!r}, into which FSDP has flattened many: pass "
        "use_orig_params=True to FSDP"
    )
