"""Deprecated alias of :mod:`lightning_lars.groups.param_groups`; the release after the next removes it."""

import sys
import warnings
from types import ModuleType
from typing import Any

from lightning_lars.groups.build import build_optimizer
from lightning_lars.groups.explanation import explain_param_groups
from lightning_lars.groups.param_groups import param_groups
from lightning_lars.groups.stale_parameters import check_holds_parameters

__all__ = ["build_optimizer", "check_holds_parameters", "explain_param_groups", "param_groups"]

warnings.warn(
    "lightning_lars.param_groups is deprecated as a module: import build_optimizer, explain_param_groups and "
    "param_groups from lightning_lars",
    DeprecationWarning,
    stacklevel=2,
)


class _ModuleAndFunction(ModuleType):
    """A callable module: importing it replaces the function of the same name in the package."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        return param_groups(*args, **kwargs)


sys.modules[__name__].__class__ = _ModuleAndFunction
