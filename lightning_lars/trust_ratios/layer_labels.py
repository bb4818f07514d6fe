"""Labels beside the rows of a heatmap of layers, few enough to be read."""

from itertools import accumulate, groupby
from typing import NamedTuple

MOST_LABELS = 60
"""The number of labels that fit beside a heatmap."""

_LONGEST_LABEL = 48


class Label(NamedTuple):
    """A label beside one or more rows of a heatmap."""

    text: str
    first: int
    """Index of its first row."""
    rows: int

    @property
    def middle(self) -> float:
        """The middle of its rows."""
        return self.first + self.rows / 2


def layer_labels(layers: list[str]) -> list[Label]:
    """Return labels for rows of layers: layer names or, if there are many, module names.

    Example:
        >>> from lightning_lars.trust_ratios.layer_labels import layer_labels
        >>> layer_labels(["conv.weight", "head.weight"])
        [Label(text='conv', first=0, rows=1), Label(text='head', first=1, rows=1)]
        >>> blocks = [f"blocks.{i}.{part}.weight" for i in range(12) for part in "abcdef"]
        >>> layer_labels(blocks)[:2]
        [Label(text='blocks.0', first=0, rows=6), Label(text='blocks.1', first=6, rows=6)]
    """
    if all(layer.endswith(".weight") for layer in layers):
        layers = [layer.removesuffix(".weight") for layer in layers]
    paths = [layer.split(".") for layer in layers]
    depths = range(max(map(len, paths)), 0, -1)
    by_depth = [[(".".join(p), len(list(run))) for p, run in groupby(q[:d] for q in paths)] for d in depths]
    # A single label for all is not informative.
    informative = [runs for runs in by_depth if 6 * len(runs) >= min(len(layers), MOST_LABELS)]
    fitting = [runs for runs in informative if len(runs) <= MOST_LABELS]
    runs = fitting[0] if fitting else min(informative, key=len)
    firsts = accumulate((rows for _, rows in runs), initial=0)
    labels = [Label(shorten(text), first, rows) for (text, rows), first in zip(runs, firsts, strict=False)]
    kept = labels[:1]
    for label in labels[1:]:
        # There is no room for two labels this close to each other.
        if label.middle - kept[-1].middle >= len(layers) / MOST_LABELS:
            kept.append(label)
    return kept


def shorten(name: str) -> str:
    """Return a name, without its middle if it is too long for a label."""
    half = _LONGEST_LABEL // 2
    return name if len(name) <= _LONGEST_LABEL else f"{name[: half - 1]}…{name[-half:]}"
