"""A table of the trust ratio, or the updates, of every layer over a run."""

import math
from collections.abc import Collection

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_lars.printing.tables import is_too_wide, print_table
from lightning_lars.rules import counted
from lightning_lars.trust_ratios.history import TrustRatioHistory

_HIDDEN_FIRST = ("last", "Effective\nlr", "min", "max")
_SHORTEST_NAME = 24
_TITLES = {"trust_ratio": "Trust ratios", "update_to_weight": "Updates"}
_HEADINGS = {"trust_ratio": "Trust\nratio", "update_to_weight": "Update /\nweight"}


def print_trust_ratios(console: Console, history: TrustRatioHistory) -> None:
    """Print :func:`trust_ratio_table`, in a narrow terminal without the least informative columns."""
    for number in range(len(_HIDDEN_FIRST) + 1):
        table = trust_ratio_table(history, hidden_columns=_HIDDEN_FIRST[:number])
        if not is_too_wide(console, table):
            break
    console.print(_TITLES[history.leading], highlight=False)
    print_table(console, table)


def trust_ratio_table(
    history: TrustRatioHistory, max_rows: int = 100, hidden_columns: Collection[str] = ()
) -> Table:
    """Return a table with a row for each layer, in the order of the network.

    Args:
        history: The recorded statistics.
        max_rows: Maximum number of rows. Of more layers, those with the smallest and the largest mean trust
            ratios, or updates, are shown, half each.
        hidden_columns: Headings of columns to hide; they are listed in the caption.

    Example:
        >>> import rich
        >>> from lightning_lars.trust_ratios.layer_statistics import OverSteps
        >>> from lightning_lars.trust_ratios.history import TrustRatioHistory
        >>> from lightning_lars.trust_ratios.table import trust_ratio_table
        >>> history = TrustRatioHistory()
        >>> history.record(10, {"trust_ratio": {"conv.weight": OverSteps(0.02, 0.01, 0.03)}})
        >>> rich.print(trust_ratio_table(history))
        ┏━━━━━━━━━━━━━┳━━━━━━━┳━━━━━━┳━━━━━━┳━━━━━━┓
        ┃             ┃ Trust ┃      ┃      ┃      ┃
        ┃ Layer       ┃ ratio ┃  min ┃  max ┃ last ┃
        ┡━━━━━━━━━━━━━╇━━━━━━━╇━━━━━━╇━━━━━━╇━━━━━━┩
        │ conv.weight │  0.02 │ 0.01 │ 0.03 │ 0.02 │
        └─────────────┴───────┴──────┴──────┴──────┘
    """
    of_ratio = history.statistics.get(history.leading, {})
    columns = [
        (_HEADINGS[history.leading], of_ratio, "mean", _number),
        ("min", of_ratio, "minimum", _number),
        ("max", of_ratio, "maximum", _number),
        ("last", of_ratio, "last", _number),
    ]
    optional = (
        ("Effective\nlr", "effective_lr", _number),
        (_HEADINGS["update_to_weight"], "update_to_weight", _number),
        ("Gradient\nnorm", "gradient_norm", _number),
        ("At\nclip", "at_trust_clip", _share),
        ("At zero\nrule", "at_zero_rule", _share),
        ("Decay\nalone", "by_decay_alone", _share),
    )
    for heading, quantity, formatted in optional:
        of_layers = history.statistics.get(quantity, {}) if quantity != history.leading else {}
        # A column of zeros is not informative.
        if any(value.maximum > 0 for value in of_layers.values()):
            columns.append((heading, of_layers, "mean", formatted))
    hiding = [heading for heading in hidden_columns if any(heading == column[0] for column in columns)]
    columns = [column for column in columns if column[0] not in hiding]
    caption = f"without {', '.join(hiding)}: widen the terminal".replace("\n", " ") if hiding else None
    table = Table(caption=caption)
    # Longer names are wrapped, but never hidden.
    shortest = min(_SHORTEST_NAME, max(map(len, of_ratio), default=0))
    table.add_column("Layer", overflow="fold", min_width=shortest)
    for heading, *_ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    layers = history.in_order(of_ratio)
    by_mean = sorted(layers, key=lambda layer: _rank(of_ratio[layer].mean))
    half = max_rows // 2
    hidden = set(by_mean[half : len(by_mean) - (max_rows - half)]) if len(layers) > max_rows else set()
    for layer in layers:
        if layer not in hidden:
            cells = (
                formatted(getattr(of_layers[layer], statistic)) if layer in of_layers else "-"
                for _, of_layers, statistic, formatted in columns
            )
            table.add_row(Text(layer), *cells)
    if hidden:
        low, high = (_number(of_ratio[by_mean[i]].mean) for i in (half, len(by_mean) - (max_rows - half) - 1))
        table.add_row(Text(f"and {counted(len(hidden), 'layer')} between {low} and {high}", style="italic"))
    return table


def _rank(mean: float) -> float:
    # NaN is neither small nor large, and must not be hidden.
    return -math.inf if math.isnan(mean) else mean


def _number(value: float) -> str:
    return f"{value:.3g}"


def _share(value: float) -> str:
    return f"{value:.0%}"
