"""The factors of an algorithm as what a kernel computes for each layer, found out by its own equation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_lars.optim.algorithm import Algorithm, Hyperparameters


@dataclass(frozen=True)
class Factor:
    """A number, times the learning rate, times the trust ratio; or ``1 - exp(number * t)``.

    It stands in :meth:`~lightning_lars.optim.algorithm.Algorithm.factors` for a number that only the kernel
    knows.
    """

    kind: str
    number: float = 1.0

    def __mul__(self, other: "Factor | float") -> "Factor":
        if isinstance(other, Factor):
            if {self.kind, other.kind} != {"lr", "ratio"}:
                raise TypeError(f"no kernel knows {self.kind} times {other.kind}")
            return Factor("lr * ratio", self.number * other.number)
        return Factor(self.kind, self.number * other)

    __rmul__ = __mul__

    def one_minus_power(self, beta: float) -> "Factor":
        """Return ``1 - beta ** t``, where this is ``t``."""
        return Factor("1 - exp(t)", math.log(beta) if beta > 0 else -math.inf)


def factors_in_kernel(
    algorithm: type[Algorithm], *, has_ratio: bool, is_first: bool, h: Hyperparameters
) -> Sequence[Factor]:
    """Return the factors of an algorithm.

    Args:
        algorithm: Whose.
        has_ratio: Whether there are trust ratios; 1 without.
        is_first: Whether it is the first step of these layers.
        h: Hyperparameters.
    """
    ratio = Factor("ratio") if has_ratio else 1.0
    factors = algorithm.factors(ratio, Factor("lr"), is_first, Factor("t"), h)
    return [factor if isinstance(factor, Factor) else Factor("number", float(factor)) for factor in factors]
