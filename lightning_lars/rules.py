"""Rules of arguments, and errors that name the argument, its rule and its value."""

import math
from numbers import Real
from typing import TypeGuard


def require(argument: str, rule: str, value: object, holds: bool) -> None:
    """Raise ValueError naming the argument, its rule and its value unless the rule holds."""
    if not holds:
        raise ValueError(f"{argument} must be {rule}, got {value!r}")


def check_non_negative(argument: str, value: float) -> None:
    """Raise ValueError unless the value is at least 0 and finite."""
    require(argument, "at least 0 and finite", value, is_number(value) and 0 <= value < math.inf)


def check_none_or_positive(argument: str, value: float | None) -> None:
    """Raise ValueError unless the value is None or above 0."""
    require(argument, "None or above 0", value, value is None or (is_number(value) and value > 0))


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether the value is an int; bools do not count."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether the value is a real number; bools do not count."""
    return isinstance(value, Real) and not isinstance(value, bool)
