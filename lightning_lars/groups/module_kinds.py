"""What type a module has, also where it stands for one of another type: scripted, traced or exported."""

import re
import sys
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import GraphModule


class Kind(NamedTuple):
    """The type of a module, or of what it stands for."""

    known: type[nn.Module] | None
    """None where only its name is."""
    name: str
    """Empty where nothing is known."""

    def is_a(self, *types: type[nn.Module]) -> bool:
        """Tell whether the type is one of these, or a subclass."""
        return self.known is not None and issubclass(self.known, types)


UNKNOWN = Kind(None, "")


def kinds_of(root: nn.Module) -> dict[nn.Module, Kind]:
    """Return what every module is, by what it was before it was scripted, traced, exported or wrapped."""
    kinds = {module: _kind(module) for module in root.modules()}
    for graph in root.modules():
        # An exported program, and a traced function of a module, keep parameters in modules without a type.
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
        # Its compiled type alone remembers where the class was defined.
        compiled = getattr(module, "_c", None)
        name = compiled._type().qualified_name() if compiled is not None else module.original_name
        return _resolve(name.removeprefix("__torch__."))
    if _is_unflattened(module):
        name = getattr(module, "type_name", lambda: None)()
        return _resolve(name) if name else UNKNOWN
    kind = type(module)
    # FSDP2 and parametrizations put a subclass in the place of a type, with a name made of its name.
    while True:
        names = {
            f"{prefix}{base.__name__}": base for prefix in ("FSDP", "Parametrized") for base in kind.__bases__
        }
        if kind.__name__ not in names:
            return Kind(kind, kind.__name__)
        kind = names[kind.__name__]


def _resolve(qualified_name: str) -> Kind:
    """Return the type of that name if its module has been imported here."""
    parts = [part for part in qualified_name.split(".") if not part.startswith("___torch_mangle_")]
    path, name = ".".join(parts[:-1]), parts[-1]
    known: Any = getattr(sys.modules.get(path or "__main__"), name, None)
    if known is None and path == "torch.nn.utils.parametrize":
        # The subclass of a parametrized module, of whose class the name is left.
        name = name.removeprefix("Parametrized")
        known = getattr(nn, name, None)
    if isinstance(known, type) and issubclass(known, nn.Module):
        return Kind(known, name)
    return Kind(None, name)


def _types_by_path(graph: GraphModule) -> dict[str, Kind]:
    """Return the types of the modules whose code a graph holds, by where they were in the original."""
    kinds = {}
    for node in graph.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            # A module that is called again has a number behind its path.
            path = re.sub(r"@\d+", "", path)
            kinds[path] = Kind(kind, kind.__name__) if isinstance(kind, type) else _resolve(str(kind))
    return kinds


def _is_unflattened(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.export.unflatten"
