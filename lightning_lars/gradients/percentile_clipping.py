"""AutoClip (Seetharaman et al. 2020, arXiv:2007.14469): clipping at a percentile of the norms so far."""

from typing import NamedTuple

import torch
from torch import Tensor


class Clipped(NamedTuple):
    """What was clipped, over some steps."""

    norm: float
    """Before clipping, of the last step; the median over columns that had any."""
    threshold: float
    """Of the last step; the median likewise."""
    share_clipped: float
    """How many norms were above their threshold, of all that were not 0, from 0 to 1."""


class PercentileClipping:
    """Keeps the last norms of gradients, on their device, and says how to scale the next gradient.

    ::

        history = last norms, that of this step among them
        scale = min(1, percentile(history) / norm)

    Percentiles between two norms are interpolated linearly, as numpy does. Not kept are norms of 0, and all
    norms of a step that has one that is not finite.

    Args:
        percentile: From 0 to below 100; at 100 nothing would be clipped.
        history: How many norms to keep, at least 2.
        starts_full: Whether the first norm fills the history, as if it had been the only one before.

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
        # A row for each step, the last at the end; a column for each norm; NaN where none has been.
        self._norms = torch.full((history, 0), torch.nan, device="cpu")
        self._last: tuple[Tensor, Tensor] | None = None
        self._counts: Tensor | None = None  # of norms, and of those that were clipped, since the last read

    def scales(self, norms: Tensor) -> Tensor:
        """Take in the norms of a step and return the factors on its gradients, both of shape ``(columns,)``.

        Nothing comes to the host. Columns may be added from one step to the next, at the end.
        """
        self._widen(norms)
        shifted = torch.cat([self._norms[1:], norms[None]])
        if self._starts_full:
            shifted = torch.where(self._norms[-1].isnan(), norms, shifted)
        # A gradient scaler skips a step that has any gradient that is not finite.
        is_kept = norms.isfinite().all() & (norms > 0)
        self._norms = torch.where(is_kept, shifted, self._norms)

        thresholds = torch.nanquantile(self._norms, self._quantile, dim=0)
        is_clipped = norms > thresholds
        counts = torch.stack([(norms > 0).sum(), is_clipped.sum()])
        self._counts = counts if self._counts is None else self._counts + counts
        self._last = norms, thresholds
        return torch.where(is_clipped, thresholds / norms, 1.0)

    def read(self) -> Clipped | None:
        """Return what happened since the last call, in one transfer to the host; None if nothing did."""
        if self._last is None or self._counts is None:
            return None
        norms, thresholds = self._last
        had_one = norms != 0
        median_norm = norms.where(had_one, torch.nan).nanmedian()
        median_threshold = thresholds.where(had_one, torch.nan).nanmedian()
        read = torch.stack([median_norm, median_threshold, *self._counts.to(norms)])
        norm, threshold, count, clipped = read.tolist()
        self._last = self._counts = None
        return Clipped(norm, threshold, clipped / count if count else 0.0)

    def state(self) -> Tensor:
        """Return the history on the host, shape ``(history, columns)``, the last norms at the end."""
        return self._norms.cpu().clone()

    def load(self, state: Tensor) -> None:
        """Go on from a history, of any length: what is too old is left behind."""
        missing = state.new_full((max(0, self._length - len(state)), state.shape[1]), torch.nan)
        self._norms = torch.cat([missing, state])[-self._length :]

    def _widen(self, norms: Tensor) -> None:
        self._norms = self._norms.to(norms)
        new = len(norms) - self._norms.shape[1]
        if new > 0:
            self._norms = torch.cat([self._norms, self._norms.new_full((self._length, new), torch.nan)], 1)
