"""Plots of a run: trust ratios, or updates, of all layers over time, and effective learning rates."""

from __future__ import annotations

import math
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lars.rules import require
from lightning_lars.trust_ratios.history import TrustRatioHistory
from lightning_lars.trust_ratios.layer_labels import MOST_LABELS, layer_labels, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 10
_FEW_LINES, _MANY_LINES = 8, 60
_TITLES = {"trust_ratio": "Trust ratio", "update_to_weight": "Update-to-weight ratio"}
_RATES = {
    "trust_ratio": "trust ratio times learning rate (gray, scale on the right)",
    "update_to_weight": "|change of w| / |g|",
}
_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
_NO_VALUE, _NOT_FINITE, _SCHEDULE = "0.92", "#d7191c", "0.9"


def check_picture(argument: str, path: str | Path) -> None:
    """Raise if a plot cannot be saved to such a file.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If matplotlib does not know the format.
    """
    _check_matplotlib(argument)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    is_known = isinstance(path, str | Path) and Path(path).suffix[1:].lower() in known
    require(argument, "a file name that ends in .png, .pdf or .svg", path, is_known)


def _check_matplotlib(argument: str) -> None:
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(f"{argument} needs matplotlib: pip install 'lightning-lars[plot]'")


def plot_trust_ratios(history: TrustRatioHistory, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw a heatmap of the trust ratio, layers over steps, with colors on a logarithmic scale.

    Without any trust ratios, it shows update-to-weight ratios.

    The first layer of the network is at the top. If there are many layers, they share labels by module. Gray
    cells are layers that were not adapted, red ones have a ratio that is not finite.

    Args:
        history: A history with at least one record.
        ax: The axes to draw in; None creates a figure with pyplot.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the history has no records.
    """
    _check_matplotlib("plot")
    _check_recorded(history)
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    series = history.series(history.leading)
    values = np.array(list(series.values()))
    if ax is None:
        ax = _figure(height=_heat_map_height(len(series))).subplots()
    low, high = _limits(values[np.isfinite(values) & (values > 0)].tolist())
    colors = colormaps["viridis"].with_extremes(bad="none")
    edges = _edges(history.steps)
    rows = np.arange(len(series) + 1)
    positive = np.ma.masked_where(~(np.isfinite(values) & (values > 0)), values)
    mesh = ax.pcolormesh(edges, rows, positive, cmap=colors, norm=LogNorm(low, high), rasterized=True)
    not_finite = np.ma.masked_where(~np.isinf(values), np.ones_like(values))
    ax.pcolormesh(edges, rows, not_finite, cmap=ListedColormap([_NOT_FINITE]), rasterized=True)
    ax.set_facecolor(_NO_VALUE)
    labels = layer_labels(list(series))
    ax.set_yticks([label.middle for label in labels], [label.text for label in labels])
    ax.tick_params(axis="y", length=0, labelsize=8 if len(labels) > 20 else 9)
    for label in labels[1:] if len(labels) < len(series) else ():
        ax.axhline(label.first, color="white", linewidth=0.6)
    ax.invert_yaxis()
    ax.set_xlabel("optimizer step")
    ax.set_title(_TITLES[history.leading], loc="left", fontweight="bold", fontsize="medium")
    figure = ax.figure.figure  # the outermost, where the axes are in a subfigure
    figure.colorbar(mesh, ax=ax, pad=0.01, extend="both", extendfrac=0.03, aspect=_bar_aspect(len(series)))
    return figure, ax


def plot_effective_lr(history: TrustRatioHistory, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot the effective learning rate of each layer, in front of the learning rate.

    Args:
        history: A history with at least one record.
        ax: The axes to draw in; None creates a figure with pyplot.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the history has no records.
    """
    _check_matplotlib("plot")
    _check_recorded(history)
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if ax is None:
        ax = _figure(height=4).subplots()
    behind = ax.twinx()
    behind.set_zorder(ax.get_zorder() - 1)
    ax.patch.set_visible(False)
    behind.fill_between(history.steps, history.learning_rates(), color=_SCHEDULE, linewidth=0)
    behind.set_ylim(bottom=0)
    behind.tick_params(axis="y", colors="0.5")
    behind.set_visible(history.leading == "trust_ratio")

    series = history.series("effective_lr")
    values = np.array(list(series.values()))
    values[~np.isfinite(values) | (values <= 0)] = np.nan
    few = len(series) <= _FEW_LINES
    # Many lines are transparent, so that overlaps show.
    width, alpha = (1.6, 1.0) if few else (0.8, max(0.7 * min(1, _MANY_LINES / len(series)), 0.25))
    marker = "." if len(history.steps) < 20 else ""
    # Purple to orange, because yellow is not visible on white.
    share = 0.85 / max(len(series) - 1, 1)
    for i, layer in enumerate(series):
        color = colormaps["plasma"](share * i, alpha)
        # Interleaved, so that not only the last layers are on top.
        order = 2 + i * _GOLDEN_RATIO % 1
        ax.plot(
            history.steps, values[i], marker=marker, lw=width, color=color, label=shorten(layer), zorder=order
        )
    ax.set_yscale("log")
    if np.isfinite(values).any():
        # A schedule that ends at zero would take up most of a logarithmic scale.
        ax.set_ylim(bottom=float(np.nanpercentile(values, 2)) / 2)
    edges = _edges(history.steps)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_xlabel("optimizer step")
    title = f"Effective learning rate, which is {_RATES[history.leading]}"
    ax.set_title(title, loc="left", fontweight="bold", fontsize="medium")
    figure = ax.figure.figure  # the outermost, where the axes are in a subfigure
    if few:
        ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4)
    else:
        bar = figure.colorbar(
            ScalarMappable(Normalize(0, 1 / 0.85), "plasma"), ax=[ax, behind], pad=0.01, aspect=15
        )
        bar.ax.set_ylim(0, 1)
        bar.ax.invert_yaxis()
        bar.set_ticks([0, 1], labels=["first layer", "last layer"])
    return figure, ax


def plot_history(history: TrustRatioHistory, figure: Figure | None = None) -> tuple[Figure, list[Axes]]:
    """Draw heatmap and lines, one below the other; without lines if the learning rates are unknown.

    Args:
        history: A history with at least one record.
        figure: An empty figure to draw in; None creates one with pyplot, which notebooks show when their cell
            ends.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the history has no records.
    """
    _check_matplotlib("plot")
    _check_recorded(history)
    heights = [_heat_map_height(len(history.series(history.leading)))]
    if history.series("effective_lr"):
        heights.append(3.5)
    if figure is None:
        figure = _figure(height=sum(heights))
    else:
        figure.set_size_inches(_WIDTH, sum(heights))
        figure.set_layout_engine("constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0].tolist()
    for draw, ax in zip((plot_trust_ratios, plot_effective_lr), axes, strict=False):
        draw(history, ax)
    return figure, axes


def save_picture(history: TrustRatioHistory, path: Path) -> None:
    """Save heatmap and lines to a file, in the format of its suffix.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        OSError: If the file cannot be written.
        ValueError: If the history has no records, or matplotlib does not know the format.
    """
    from matplotlib.figure import Figure

    # Without pyplot, which would keep the figure and open a window.
    figure, _ = plot_history(history, Figure())
    # In memory first: where the disk is full, matplotlib's PDF fails with an error that does not say so.
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawn.getvalue())


def _check_recorded(history: TrustRatioHistory) -> None:
    if not history.series(history.leading):
        raise ValueError(
            "there is nothing to plot: no step of an optimizer has been recorded in this process. Either "
            "no run has reached its first log (log_every_n_steps), or training ran in separate processes "
            "(strategy='ddp_notebook', 'ddp_spawn', 'ddp_fork'), which have ended with what they recorded: "
            "there, TrustRatioMonitor(picture=...) saves a plot to a file"
        )


def _figure(height: float) -> Figure:
    from matplotlib import pyplot

    return pyplot.figure(figsize=(_WIDTH, height), layout="constrained")


def _heat_map_height(layers: int) -> float:
    return 1.2 + 0.17 * min(max(layers, 8), MOST_LABELS)


def _bar_aspect(layers: int) -> float:
    # A sixth of an inch wide.
    return 6 * _heat_map_height(layers)


def _limits(values: list[float]) -> tuple[float, float]:
    """Return the limits of the color scale, so that a few layers at the zero rule do not take it all."""
    import numpy as np

    if not values:
        return 0.1, 1.0
    low, high = (float(each) for each in np.percentile(values, [1, 99]))
    return (low, high) if high > 1.5 * low else (low / 1.5, high * 1.5)


def _edges(steps: list[int]) -> list[float]:
    """Return the edges of the columns: each begins where the one before ends."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    return [first, *steps]
