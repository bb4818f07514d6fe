"""Names of parameters, free of wrapper prefixes, and the modules that own them."""

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_lars.class_names import has_class_named

# Attributes of torch.compile, FSDP1, activation checkpointing and Fabric for the wrapped module.
_WRAPPED = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_original_module",
)
_WRAPPER_PART = re.compile(rf"(?<![^.])({'|'.join(_WRAPPED)})\.")

_ORIGINAL = re.compile(r"original\d*")

# These call it "module", as users may too. By class name, because several packages define such a class.
_DATA_PARALLEL = {"AveragedModel", "DataParallel", "DeepSpeedEngine", "DistributedDataParallel",
                  "FullyShardedDataParallel", "ShardedDataParallel"}  # fmt: skip


class Alias(NamedTuple):
    """One path to a parameter; tied parameters have several."""

    name: str
    attribute: str
    owner: nn.Module
    """The module that the parameter belongs to; never a ParameterList or parametrization."""
    holder: nn.Module
    """Where it is registered."""


def aliases_of(module: nn.Module) -> dict[nn.Parameter, list[Alias]]:
    """Return all paths to each parameter of a module, in the module's order."""
    aliases: dict[nn.Parameter, list[Alias]] = {}
    modules = dict(module.named_modules(remove_duplicate=False))
    for path, holder in modules.items():
        clean = clean_path(path, modules)
        for attribute, parameter in holder.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{clean}.{attribute}" if clean else attribute
            owner = holder
            if _is_parametrized(path, attribute, holder):
                # `fc.parametrizations.weight` holds the tensors from which `fc.weight` is computed.
                *outer, _, of = path.split(".")
                attribute = f"{of}_g" if _is_length(holder, attribute) else of
                owner = holder = modules[".".join(outer)]
            elif isinstance(holder, nn.ParameterList | nn.ParameterDict) and path:
                *outer, called = path.split(".")
                owner = modules[".".join(outer)]
                attribute = called if isinstance(holder, nn.ParameterList) else attribute
            aliases.setdefault(parameter, []).append(Alias(name, attribute, owner, holder))
    return aliases


def names_of(module: nn.Module) -> dict[Tensor, str]:
    """Return the first name of each parameter, without the prefixes of wrappers."""
    return {parameter: named[0].name for parameter, named in aliases_of(module).items()}


def clean_path(path: str, modules: dict[str, nn.Module]) -> str:
    """Return the path of a module without the components that wrappers add.

    Args:
        path: A path of ``named_modules``.
        modules: All modules by their paths of ``named_modules``.
    """
    parts = path.split(".")
    return ".".join(
        part
        for depth, part in enumerate(parts)
        if part not in _WRAPPED and not (part == "module" and _is_parallel(modules[".".join(parts[:depth])]))
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of any wrappers."""
    while True:
        inner = [name for name in _WRAPPED if isinstance(getattr(module, name, None), nn.Module)]
        if not inner and _is_parallel(module):
            inner = ["module"]
        if not inner:
            return module
        module = getattr(module, inner[0])


def matches(name: str, pattern: str, prefix: str) -> bool:
    """Return whether an fnmatch pattern matches a name, with the user's prefix or without."""
    return fnmatchcase(name, str(pattern)) or fnmatchcase(prefix + name, str(pattern))


def closest(pattern: str, names: Sequence[str]) -> str:
    """Say which names a pattern that matches none may have meant."""
    found = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    return f"the closest names are {found}, and '*' stands for any part of a name"


def without_wrappers(name: str) -> str:
    """Return a name without the components that only wrappers add."""
    return _WRAPPER_PART.sub("", name)


def _is_parametrized(path: str, attribute: str, holder: nn.Module) -> bool:
    if isinstance(holder, ParametrizationList):
        return True
    # Scripted, traced and exported lists have another type.
    return path.split(".")[-2:-1] == ["parametrizations"] and _ORIGINAL.fullmatch(attribute) is not None


def _is_length(parametrized: nn.Module, attribute: str) -> bool:
    """Return whether this is the magnitude in weight normalization, which it also calls ``weight_g``."""
    if attribute != "original0" or not isinstance(parametrized, ParametrizationList):
        return attribute == "original0"  # torch has no other parametrization that splits a weight
    return type(parametrized[0]).__name__ == "_WeightNorm"  # which has no public name


def _is_parallel(module: nn.Module) -> bool:
    return has_class_named(module, *_DATA_PARALLEL)
