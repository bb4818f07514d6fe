"""Lets ``torch.load(weights_only=True)`` load hyperparameters that contain optimizers and schedulers."""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial, reduce, wraps
from inspect import isclass, isfunction
from typing import Any, TypeVar, cast

import torch
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.serialization import add_safe_globals, get_safe_globals, safe_globals

import lightning_lars.optim
from lightning_lars.learning_rate.warmup_decay import WarmupDecayLR
from lightning_lars.optim import LAMB, LARS, LAMB8bit, LARS8bit

_Module = TypeVar("_Module")

# The paths of classes in checkpoints of 0.1.0.
_EARLIER_NAMES: dict[Any, str] = {
    LARS: "lightning_lars.optim.lars.LARS",
    LAMB: "lightning_lars.optim.lamb.LAMB",
    LARS8bit: "lightning_lars.optim.eight_bit.LARS8bit",
    LAMB8bit: "lightning_lars.optim.eight_bit.LAMB8bit",
    WarmupDecayLR: "lightning_lars.schedules.WarmupDecayLR",
}


def known_globals() -> list[Any]:
    """Return the optimizers and schedulers of this package and of torch, and ``functools.partial``."""
    modules = (lightning_lars.optim, torch.optim, lr_scheduler, swa_utils)
    named = [WarmupDecayLR, *(each for module in modules for each in vars(module).values())]
    rules = (Optimizer, lr_scheduler.LRScheduler)
    known = dict.fromkeys(each for each in named if isclass(each) and issubclass(each, rules))
    return [partial, *globals_of([*known])]


def globals_of(value: Any) -> Iterator[Any]:
    """Yield the classes and functions that a pickle of a value refers to, also inside ``functools.partial``.

    A class with an earlier path is also yielded as ``(class, path)``, as torch expects it.

    Example:
        >>> from functools import partial
        >>> from torch.optim import SGD
        >>> from lightning_lars.trainer.safe_globals import globals_of
        >>> [each.__name__ for each in globals_of([partial(SGD, lr=0.1), lambda groups: SGD(groups)])]
        ['partial', 'SGD']
    """
    if isinstance(value, partial):
        yield from globals_of(type(value))
        yield from globals_of([value.func, *value.args, *value.keywords.values()])
    elif isinstance(value, Mapping):
        yield from globals_of([*value.values()])
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from globals_of(each)
    elif (isclass(value) or isfunction(value)) and _is_found_by_name(value):
        yield value
        earlier = _EARLIER_NAMES.get(value)
        if earlier not in (None, f"{value.__module__}.{value.__qualname__}"):
            yield value, earlier


def trust_globals_of(*values: Any) -> None:
    """Allow this process to load checkpoints that refer to the classes in these values."""
    add_safe_globals(list(globals_of(values)))


class LoadFromCheckpoint:
    """A module's ``load_from_checkpoint`` that allows known optimizers and schedulers during the load.

    During the load, torch also allows :func:`known_globals`; afterwards its list is as before. Torch's error
    about any other class says how to allow it.

    Args:
        afterwards: Called with the loaded module.
    """

    def __init__(self, afterwards: Callable[[Any], None]) -> None:
        self._afterwards = afterwards

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, instance: _Module | None, owner: type[_Module]) -> Callable[..., _Module]:
        # A call on an instance is an error, which Lightning raises.
        load = getattr(super(self._owner, owner if instance is None else instance), self._name)

        @wraps(load)
        def load_from_checkpoint(*args: Any, **kwargs: Any) -> _Module:
            allowed = get_safe_globals()  # which torch would remove at the end
            with safe_globals([each for each in known_globals() if each not in allowed]):
                module = load(*args, **kwargs)
            self._afterwards(module)
            return cast(_Module, module)

        return load_from_checkpoint


def _is_found_by_name(value: Any) -> bool:
    """Return whether a pickle can refer to the value by name; local classes and functions cannot be."""
    try:
        found = reduce(getattr, value.__qualname__.split("."), sys.modules[value.__module__])
    except (AttributeError, KeyError):
        return False
    return found is value
