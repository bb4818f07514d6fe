"""Rules for arguments, and errors that name the argument, its rule and its value."""

import math
import operator
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple, TypeGuard, TypeVar


class Rule(NamedTuple):
    """A condition on a value, with its wording in error messages.

    Example:
        >>> from lightning_lars.rules import FRACTION, check
        >>> check({"momentum": FRACTION}, {"momentum": 1.5})
        Traceback (most recent call last):
        ValueError: momentum must be in [0, 1), got 1.5
    """

    text: str
    """The text that follows "must be" in the error."""

    holds: Callable[[Any], bool]

    def check(self, argument: str, value: object) -> None:
        """Raise ValueError if the value of this argument breaks the rule."""
        require(argument, self.text, value, self.holds(value))

    def checked_int(self, argument: str, value: Any) -> int:
        """Return an integer of any type as an int, or raise ValueError if it breaks the rule."""
        number: int = as_int(value)
        self.check(argument, number)
        return number


def is_number(value: object) -> TypeGuard[float]:
    """Return whether the value is a real number; bools do not count."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether the value is an integer, also of NumPy or a 0-d tensor; bools do not count."""
    return isinstance(as_int(value), int) and not isinstance(value, bool)


_T = TypeVar("_T")


def as_int(value: _T) -> _T:
    """Return an integer of another type, such as NumPy's or a 0-d tensor, as an int; others unchanged."""
    given: Any = value
    if isinstance(value, bool) or getattr(given, "ndim", 0) > 0 or "bool" in str(getattr(given, "dtype", "")):
        return value
    try:
        given = operator.index(given)
    except TypeError:
        return value
    number: _T = given
    return number


def is_positive(value: object) -> bool:
    """Return whether the value is a number above 0, which may be infinite."""
    return is_number(value) and value > 0


NON_NEGATIVE = Rule("at least 0 and finite", lambda value: is_number(value) and 0 <= value < math.inf)
POSITIVE = Rule("above 0 and finite", lambda value: is_number(value) and 0 < value < math.inf)
FRACTION = Rule("in [0, 1)", lambda value: is_number(value) and 0 <= value < 1)
FLAG = Rule("True or False", lambda value: isinstance(value, bool))
NONE_OR_FLAG = Rule("None, True or False", lambda value: value is None or isinstance(value, bool))
NONE_OR_POSITIVE = Rule("None or above 0", lambda value: value is None or is_positive(value))
WHOLE = Rule("an integer, at least 0", lambda value: is_whole(value) and value >= 0)
POSITIVE_WHOLE = Rule("an integer above 0", lambda value: is_whole(value) and value > 0)


def is_pair(value: object) -> TypeGuard[tuple[float, float]]:
    """Return whether the value is two numbers, in a tuple or, as YAML gives them, in a list."""
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(is_number, value))


TWO_FRACTIONS = Rule(
    "two numbers in [0, 1)", lambda value: is_pair(value) and all(0 <= share < 1 for share in value)
)


def one_of(*words: str) -> Rule:
    """Return the rule that a value is one of these words."""
    return Rule(f"one of {words}", lambda value: value in words)


def positive_or(word: str) -> Rule:
    """Return the rule that a value is None, this word, or a number above 0."""
    return Rule(
        f'None, "{word}" or a number above 0', lambda value: value in (None, word) or is_positive(value)
    )


def check(rules: Mapping[str, Rule], values: Mapping[str, Any]) -> None:
    """Raise ValueError for the first value that breaks its rule."""
    for name, rule in rules.items():
        rule.check(name, values[name])


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the singular for 1.

    Example:
        >>> from lightning_lars.rules import counted
        >>> counted(1, "step"), counted(2, "step")
        ('1 step', '2 steps')
    """
    return f"{number} {noun if number == 1 else f'{noun}s'}"


def require(argument: str, rule: str, value: object, holds: bool) -> None:
    """Raise ValueError naming the argument, its rule and its value unless the rule holds."""
    if not holds:
        raise ValueError(f"{argument} must be {rule}, got {value!r}")
