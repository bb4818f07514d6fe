"""The factors of an algorithm in symbolic form, for a kernel to evaluate for each layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_lars.optim.algorithm import Algorithm, Hyperparameters


@dataclass(frozen=True)
class Factor:
    """A symbolic factor: a number, times the learning rate or the trust ratio; or ``1 - exp(number * t)``.

    :meth:`~lightning_lars.optim.algorithm.Algorithm.factors` computes with it in place of values that are
    only known on the device.
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
        """Return ``1 - beta ** t``, where this factor is ``t``."""
        return Factor("1 - exp(t)", math.log(beta) if beta > 0 else -math.inf)


def factors_in_kernel(
    algorithm: type[Algorithm], *, has_ratio: bool, is_first: bool, h: Hyperparameters
) -> Sequence[Factor]:
    """Return the factors of an algorithm.

    Args:
        algorithm: The algorithm.
        has_ratio: Whether there are trust ratios; otherwise the ratio is 1.
        is_first: Whether this is the first step of these layers.
        h: The hyperparameters of the group.
    """
    ratio = Factor("ratio") if has_ratio else 1.0
    factors = algorithm.factors(ratio, Factor("lr"), is_first, Factor("t"), h)
    return [factor if isinstance(factor, Factor) else Factor("number", float(factor)) for factor in factors]
