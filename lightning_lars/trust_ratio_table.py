"""A table of what the trust ratio of every layer did over a training."""

import math

from rich.table import Table
from rich.text import Text

from lightning_lars.trust_ratio_history import TrustRatioHistory


def trust_ratio_table(history: TrustRatioHistory, max_rows: int = 100) -> Table:
    """Return a row for each layer, in the order of the network.

    Args:
        history: What was recorded.
        max_rows: Rows to fill at most. Of more layers, those with the smallest and the largest mean trust
            ratios are shown, half each.

    Example:
        >>> import rich
        >>> from lightning_lars.step_statistics import OverSteps
        >>> from lightning_lars.trust_ratio_history import TrustRatioHistory
        >>> from lightning_lars.trust_ratio_table import trust_ratio_table
        >>> history = TrustRatioHistory()
        >>> history.record(10, {"trust_ratio": {"conv.weight": OverSteps(0.02, 0.01, 0.03)}})
        >>> rich.print(trust_ratio_table(history))
        ┏━━━━━━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━┳━━━━━━┳━━━━━━┓
        ┃ Layer       ┃ Trust ratio ┃  min ┃  max ┃ last ┃
        ┡━━━━━━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━╇━━━━━━╇━━━━━━┩
        │ conv.weight │        0.02 │ 0.01 │ 0.03 │ 0.02 │
        └─────────────┴─────────────┴──────┴──────┴──────┘
    """
    of_ratio = history.statistics.get("trust_ratio", {})
    rates, updates, clipped, zero = (
        history.statistics.get(quantity, {})
        for quantity in ("effective_lr", "update_to_weight", "at_trust_clip", "at_zero_rule")
    )
    table = Table()
    table.add_column("Layer", overflow="fold")
    optional = (
        ("Effective lr", rates, _number),
        ("Update / weight", updates, _number),
        ("At clip", clipped, _share),
        ("At zero rule", zero, _share),
    )
    # A column in which nothing ever happened says nothing.
    shown = [
        (heading, values, written)
        for heading, values, written in optional
        if any(value.maximum > 0 for value in values.values())
    ]
    for heading in ("Trust ratio", "min", "max", "last", *(heading for heading, *_ in shown)):
        table.add_column(heading, justify="right", no_wrap=True)
    layers = history.in_order(of_ratio)
    by_mean = sorted(layers, key=lambda layer: _rank(of_ratio[layer].mean))
    half = max_rows // 2
    hidden = set(by_mean[half : len(by_mean) - (max_rows - half)]) if len(layers) > max_rows else set()
    for layer in layers:
        if layer not in hidden:
            ratio = of_ratio[layer]
            cells = [_number(each) for each in (ratio.mean, ratio.minimum, ratio.maximum, ratio.last)]
            cells += [written(values[layer].mean) if layer in values else "-" for _, values, written in shown]
            table.add_row(Text(layer), *cells)
    if hidden:
        low, high = (_number(of_ratio[by_mean[i]].mean) for i in (half, len(by_mean) - (max_rows - half) - 1))
        table.add_row(Text(f"and {len(hidden)} layers between {low} and {high}", style="italic"))
    return table


def _rank(mean: float) -> float:
    # Not a number is neither small nor large, and must not be hidden.
    return -math.inf if math.isnan(mean) else mean


def _number(value: float) -> str:
    return f"{value:.3g}"


def _share(value: float) -> str:
    return f"{value:.0%}"
