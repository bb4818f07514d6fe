"""Parameters that a model itself excludes from weight decay, by the conventions of timm and of Mamba."""

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_lars.groups.parameter_names import clean_path, without_wrappers


class Listed(NamedTuple):
    """The names that a module lists, with its path in the model."""

    path: str
    names: frozenset[str]
    """Names of parameters, or of modules with all their parameters."""
    keywords: frozenset[str]
    """Substrings of names."""

    def holds(self, name: str) -> bool:
        """Return whether a parameter is listed, by its name in the whole model."""
        if self.path:
            if not name.startswith(f"{self.path}."):
                return False
            name = name.removeprefix(f"{self.path}.")
        parts = name.split(".")
        beginnings = {".".join(parts[: depth + 1]) for depth in range(len(parts))}
        return bool(beginnings & self.names) or any(keyword in name for keyword in self.keywords)


def is_marked(parameter: Tensor) -> bool:
    """Return whether the model has set ``_no_weight_decay = True`` on the parameter, as Mamba and S4 do."""
    return getattr(parameter, "_no_weight_decay", False) is True


def listed_in(model: nn.Module) -> list[Listed]:
    """Return the names that the model, and each of its submodules, lists in ``no_weight_decay()``.

    The names are relative to the module. Swin also lists substrings in ``no_weight_decay_keywords()``. An
    attribute of these names that is no collection of strings is ignored.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    listed = (
        Listed(
            clean_path(path, modules),
            _strings(module, "no_weight_decay"),
            _strings(module, "no_weight_decay_keywords"),
        )
        for path, module in modules.items()
    )
    return [each for each in listed if each.names or each.keywords]


def _strings(module: nn.Module, attribute: str) -> frozenset[str]:
    value: Any = getattr(module, attribute, None)
    if inspect.ismethod(value) or inspect.isfunction(value):
        asked = inspect.signature(value).parameters.values()
        if any(each.default is each.empty for each in asked):
            return frozenset()
        with _no_collectives(module):
            value = value()
    if isinstance(value, str) or not isinstance(value, Collection):
        return frozenset()
    return frozenset(without_wrappers(each) for each in value if isinstance(each, str))


@contextmanager
def _no_collectives(module: nn.Module) -> Iterator[None]:
    """Keep models that look up names in their ``state_dict()`` from gathering the shards of FSDP1.

    A submodule that is asked before its first forward would also become an FSDP root.
    """
    if any(isinstance(each, FullyShardedDataParallel) for each in module.modules()):
        names = {without_wrappers(name): tensor for name, tensor in module.named_parameters()}
        module.__dict__["state_dict"] = lambda *_, **__: names
    try:
        yield
    finally:
        module.__dict__.pop("state_dict", None)
