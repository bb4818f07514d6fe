"""AutoClip (Seetharaman et al. 2020, arXiv:2007.14469): clipping at a percentile of past gradient norms."""

from typing import NamedTuple

import torch
from torch import Tensor


class Clipped(NamedTuple):
    """Statistics of clipping over some steps."""

    norm: float
    """Norm before clipping, in the last step; the median over columns with a norm."""
    threshold: float
    """Threshold in the last step; the median likewise."""
    share_clipped: float
    """Fraction of nonzero norms that were above their threshold, from 0 to 1."""


class PercentileClipping:
    """Keeps a history of gradient norms on their device, and computes the scale of the next gradient.

    ::

        history = last norms, this step's included
        scale = min(1, percentile(history) / norm)

    Percentiles between two norms are interpolated linearly, as in numpy. Norms of 0, and all norms of a step
    with a non-finite one, do not enter the history.

    Args:
        percentile: From 0 to below 100; at 100 nothing would be clipped.
        history: Number of norms to keep, at least 2.
        starts_full: Whether the first norm fills the history, as if all earlier norms had been the same.

    Example:
        >>> import torch
        >>> from lightning_lars.gradients.percentile_clipping import PercentileClipping
        >>> clipping = PercentileClipping(percentile=50.0, history=3)
        >>> for norm in (1.0, 1.0, 4.0, 3.0, 3.0):
        ...     print(clipping.scales(torch.tensor([norm])).item())
        1.0
        1.0
        0.25
        1.0
        1.0
        >>> clipping.read()
        Clipped(norm=3.0, threshold=3.0, share_clipped=0.2)
    """

    def __init__(self, percentile: float, history: int, starts_full: bool = False) -> None:
        self._quantile = percentile / 100
        self._starts_full = starts_full
        self._length = history
        # A row for each step, the latest last; a column for each norm; NaN where there is none yet.
        self._norms = torch.full((history, 0), torch.nan, device="cpu")
        self._last: tuple[Tensor, Tensor] | None = None
        self._counts: Tensor | None = None  # norms, and clipped norms, since the last read

    def scales(self, norms: Tensor) -> Tensor:
        """Add the norms of a step and return the factors on its gradients, both of shape ``(columns,)``.

        Does not synchronize. Columns may be appended from one step to the next.
        """
        self._widen(norms)
        shifted = torch.cat([self._norms[1:], norms[None]])
        if self._starts_full:
            shifted = torch.where(self._norms[-1].isnan(), norms, shifted)
        # A gradient scaler skips a step with any non-finite gradient.
        is_kept = norms.isfinite().all() & (norms > 0)
        self._norms = torch.where(is_kept, shifted, self._norms)

        thresholds = torch.nanquantile(self._norms, self._quantile, dim=0)
        is_clipped = norms > thresholds
        counts = torch.stack([(norms > 0).sum(), is_clipped.sum()])
        self._counts = counts if self._counts is None else self._counts + counts
        self._last = norms, thresholds
        return torch.where(is_clipped, thresholds / norms, 1.0)

    def read(self) -> Clipped | None:
        """Return statistics since the last call, in one device-to-host copy; None without steps."""
        if self._last is None or self._counts is None:
            return None
        norms, thresholds = self._last
        is_nonzero = norms != 0
        median_norm = norms.where(is_nonzero, torch.nan).nanmedian()
        median_threshold = thresholds.where(is_nonzero, torch.nan).nanmedian()
        read = torch.stack([median_norm, median_threshold, *self._counts.to(norms)])
        norm, threshold, count, clipped = read.tolist()
        self._last = self._counts = None
        return Clipped(norm, threshold, clipped / count if count else 0.0)

    def state(self) -> Tensor:
        """Return the history on the host, shape ``(history, columns)``, the latest norms last."""
        return self._norms.cpu().clone()

    def load(self, state: Tensor) -> None:
        """Continue from a history of any length; entries that are too old are dropped."""
        missing = state.new_full((max(0, self._length - len(state)), state.shape[1]), torch.nan)
        self._norms = torch.cat([missing, state])[-self._length :]

    def _widen(self, norms: Tensor) -> None:
        self._norms = self._norms.to(norms)
        new = len(norms) - self._norms.shape[1]
        if new > 0:
            self._norms = torch.cat([self._norms, self._norms.new_full((self._length, new), torch.nan)], 1)
