"""Finds the original class of a module, also after it was scripted, traced, exported or wrapped."""

import re
import sys
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import GraphModule


class Kind(NamedTuple):
    """The class of a module, or of the original that it was made from."""

    known: type[nn.Module] | None
    """None where only its name is known."""
    name: str
    """Empty where nothing is known."""

    def is_a(self, *types: type[nn.Module]) -> bool:
        """Return whether the class is one of these, or a subclass."""
        return self.known is not None and issubclass(self.known, types)


UNKNOWN = Kind(None, "")


def kinds_of(root: nn.Module) -> dict[nn.Module, Kind]:
    """Return the original class of every module, before it was scripted, traced, exported or wrapped."""
    kinds = {module: _kind(module) for module in root.modules()}
    for graph in root.modules():
        # An exported program, and a traced function of a module, keep parameters in plain nn.Modules.
        if isinstance(graph, GraphModule):
            types = _types_by_path(graph)
        elif _is_unflattened(graph):
            types = {}
        else:
            continue
        for path, module in graph.named_modules():
            if type(module) is nn.Module:
                kinds[module] = types.get(path, UNKNOWN)
        if "" in types:
            kinds[graph] = types[""]
    return kinds


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, torch.jit.ScriptModule):
        # Only its compiled type records where the class was defined.
        compiled = getattr(module, "_c", None)
        name = compiled._type().qualified_name() if compiled is not None else module.original_name
        return _resolve(name.removeprefix("__torch__."))
    if _is_unflattened(module):
        name = getattr(module, "type_name", lambda: None)()
        return _resolve(name) if name else UNKNOWN
    kind = type(module)
    # FSDP2 and parametrizations replace a class by a subclass, with a name derived from it.
    while True:
        names = {
            f"{prefix}{base.__name__}": base for prefix in ("FSDP", "Parametrized") for base in kind.__bases__
        }
        if kind.__name__ not in names:
            return Kind(kind, kind.__name__)
        kind = names[kind.__name__]


def _resolve(qualified_name: str) -> Kind:
    """Return the class of that name if its module has been imported."""
    parts = [part for part in qualified_name.split(".") if not part.startswith("___torch_mangle_")]
    path, name = ".".join(parts[:-1]), parts[-1]
    known: Any = getattr(sys.modules.get(path or "__main__"), name, None)
    if known is None and path == "torch.nn.utils.parametrize":
        # The class of a parametrized module, of which only the name is left.
        name = name.removeprefix("Parametrized")
        known = getattr(nn, name, None)
    if isinstance(known, type) and issubclass(known, nn.Module):
        return Kind(known, name)
    return Kind(None, name)


def _types_by_path(graph: GraphModule) -> dict[str, Kind]:
    """Return the classes of the modules that a graph was traced from, by their original paths."""
    kinds = {}
    for node in graph.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            # Repeated calls of a module append a number to its path.
            path = re.sub(r"@\d+", "", path)
            kinds[path] = Kind(kind, kind.__name__) if isinstance(kind, type) else _resolve(str(kind))
    return kinds


def _is_unflattened(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.export.unflatten"
