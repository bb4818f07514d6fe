"""The gradient noise scale of McCandlish et al. 2018, arXiv:1812.06162, from gradients of two batch sizes."""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_lars.sharding.norms import widest_float

_Square = TypeVar("_Square", float, Tensor)


def two_batch_estimates(
    small_square: _Square, big_square: _Square, small_batch: float, big_batch: float
) -> tuple[_Square, _Square]:
    """Return the trace of the gradient's covariance, and the squared norm of the noise-free gradient.

    ::

        tr_sigma = (small_square - big_square) / (1 / small_batch - 1 / big_batch)
        squared_gradient = (big_batch * big_square - small_batch * small_square) / (big_batch - small_batch)

    Appendix A.1. Both are unbiased, and may be negative by chance; their quotient, the noise scale
    ``B_simple``, is biased: average each before dividing.

    Args:
        small_square: Squared norm of the mean gradient of ``small_batch`` samples, or the mean of several.
        big_square: The same of ``big_batch`` samples.
        small_batch: Samples, above 0.
        big_batch: Samples, above ``small_batch``.

    Example:
        >>> from lightning_lars.gradients.noise_scale import two_batch_estimates
        >>> squared_gradient, tr_sigma = 2.0, 10.0
        >>> small, big = squared_gradient + tr_sigma / 4, squared_gradient + tr_sigma / 16
        >>> two_batch_estimates(small, big, small_batch=4, big_batch=16)
        (10.0, 2.0)
    """
    tr_sigma = (small_square - big_square) / (1 / small_batch - 1 / big_batch)
    squared_gradient = (big_batch * big_square - small_batch * small_square) / (big_batch - small_batch)
    return tr_sigma, squared_gradient


class NoiseScale(NamedTuple):
    """Averaged estimates of the gradient noise scale."""

    tr_sigma: float
    """Trace of the covariance of the gradient of one sample."""
    squared_gradient: float
    """Squared norm of the gradient without noise."""
    b_simple: float | None
    """Their quotient, in samples; None unless both are above 0."""
    standard_error: float | None
    """Of ``b_simple``, to first order; None where that is, or before the second measurement."""


class MovingNoiseScale:
    """Exponential moving averages of two-batch estimates, on the device of the estimates.

    ::

        average = decay * average + (1 - decay) * estimate      divided by 1 - decay ** measurements

    Second moments are averaged likewise, for the standard error. It assumes that measurements are
    independent, and counts a drift of the measured quantities as noise.

    Args:
        decay: Fraction of its weight that a measurement keeps at the next one, from 0 to below 1.
        state: The ``state()`` to continue from.

    Example:
        >>> import torch
        >>> from lightning_lars.gradients.noise_scale import MovingNoiseScale
        >>> moving = MovingNoiseScale(decay=0.9)
        >>> for tr_sigma, squared_gradient in [(9.0, 1.0), (11.0, 3.0), (10.0, -1.0)]:
        ...     moving.update(torch.tensor(tr_sigma), torch.tensor(squared_gradient))
        >>> round(moving.read().b_simple, 3)
        10.833
    """

    def __init__(self, decay: float, state: Sequence[float] | None = None) -> None:
        # Of 1, tr_sigma, squared_gradient, their squares and their product; and the sum of squared weights.
        self._sums = torch.tensor(state or [0.0] * 7, dtype=torch.float64, device="cpu")
        self._kept = torch.tensor([decay] * 6 + [decay**2], dtype=torch.float64, device="cpu")
        self._added = torch.tensor([1 - decay] * 6 + [(1 - decay) ** 2], dtype=torch.float64, device="cpu")

    def update(self, tr_sigma: Tensor, squared_gradient: Tensor, counts: Tensor | None = None) -> None:
        """Add a measurement without synchronizing; skip it if it is not finite.

        Args:
            tr_sigma: 0-d.
            squared_gradient: 0-d, on the same device.
            counts: 0-d bool, whether to add it; None means yes.
        """
        if self._sums.device != tr_sigma.device:
            device = tr_sigma.device
            self._sums, self._kept, self._added = (
                each.to(device, widest_float(device)) for each in (self._sums, self._kept, self._added)
            )
        trace, gradient = tr_sigma.to(self._sums), squared_gradient.to(self._sums)
        one = torch.ones_like(trace)
        measured = torch.stack(
            [one, trace, gradient, trace.square(), gradient.square(), trace * gradient, one]
        )
        is_finite = measured.isfinite().all()
        updated = self._kept * self._sums + self._added * measured
        self._sums = torch.where(is_finite if counts is None else is_finite & counts, updated, self._sums)

    def read(self) -> NoiseScale | None:
        """Return the averages, in one device-to-host copy; None before the first measurement."""
        weight, *sums, squared_weights = self.state()
        if not weight:
            return None
        trace, gradient, traces, gradients, products = (each / weight for each in sums)
        if trace <= 0 or gradient <= 0:
            return NoiseScale(trace, gradient, None, None)
        b_simple = trace / gradient
        # 1 over the number of measurements, if all had the same weight.
        share = squared_weights / weight**2
        if share > 1 - 1e-9:
            return NoiseScale(trace, gradient, b_simple, None)
        # Variance of trace / gradient of one measurement, relative, to first order.
        spread = (traces - trace**2) / trace**2 + (gradients - gradient**2) / gradient**2
        spread -= 2 * (products - trace * gradient) / (trace * gradient)
        standard_error = b_simple * math.sqrt(max(spread, 0.0) * share / (1 - share))
        return NoiseScale(trace, gradient, b_simple, standard_error)

    def state(self) -> list[float]:
        """Return the state, from which another instance continues exactly."""
        return [float(each) for each in self._sums.tolist()]


def describe(measured: NoiseScale, batch_size: float) -> str:
    """Describe what the noise scale implies for a batch size.

    ::

        steps   = fewest steps   * (1 + B_simple / batch_size)
        samples = fewest samples * (1 + batch_size / B_simple)

    Args:
        measured: The result of ``read()``.
        batch_size: Effective batch size.

    Example:
        >>> from lightning_lars.gradients.noise_scale import NoiseScale, describe
        >>> print(describe(NoiseScale(800.0, 2.0, 400.0, 31.0), batch_size=8).split(": ")[0])
        the effective batch size 8 is a factor of 50 below the critical one, about 400 +- 31
    """
    if measured.b_simple is None:
        lost, other = ("gradient", "noise") if measured.squared_gradient <= 0 else ("noise", "gradient")
        return (
            f"the {lost} is lost in the {other} (tr_sigma {measured.tr_sigma:.3g}, squared_gradient "
            f"{measured.squared_gradient:.3g}), so that there is no estimate of the critical batch size: "
            "average over more steps, with a decay closer to 1 or a smaller every_n_steps"
        )
    ratio = batch_size / measured.b_simple
    where = f"a factor of {max(ratio, 1 / ratio):.2g} {'below' if ratio < 1 else 'above'}"
    if 0.95 < ratio < 1.05:
        where = "equal to"
    error = "" if measured.standard_error is None else f" +- {measured.standard_error:.2g}"
    steps, samples = 1 + 1 / ratio, 1 + ratio
    return (
        f"the effective batch size {batch_size} is {where} the critical one, about "
        f"{measured.b_simple:.3g}{error}: twice the batch would take {(1 + 0.5 / ratio) / steps:.0%} of the "
        f"steps and {(1 + 2 * ratio) / samples:.0%} of the samples (steps: {steps:.3g} times the fewest, "
        f"samples: {samples:.3g} times the fewest)"
    )
