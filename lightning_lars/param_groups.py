"""Deprecated path of :mod:`lightning_lars.groups.param_groups`; goes in the release after the next."""

import sys
import warnings
from types import ModuleType
from typing import Any

from lightning_lars.groups.param_groups import (
    build_optimizer,
    check_holds_parameters,
    explain_param_groups,
    param_groups,
)

__all__ = ["build_optimizer", "check_holds_parameters", "explain_param_groups", "param_groups"]

warnings.warn(
    "lightning_lars.param_groups is deprecated as a module: import build_optimizer, explain_param_groups and "
    "param_groups from lightning_lars",
    DeprecationWarning,
    stacklevel=2,
)


class _ModuleAndFunction(ModuleType):
    """A module that, once imported, stands in the place of the package's function: it is called as that."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        return param_groups(*args, **kwargs)


sys.modules[__name__].__class__ = _ModuleAndFunction
