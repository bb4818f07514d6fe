"""Line charts as inline SVG."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from lightning_lars.run_report.run import Points

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 880, 240, 70, 24, 10
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")
_LOGARITHMIC = 30.0
"""Ratio of the largest to the smallest value above which the scale is logarithmic."""


def line_chart(title: str, lines: Mapping[str, Points]) -> str:
    """Return a chart of values over steps, with a legend; lines show their names on hover.

    The scale is logarithmic where all values are above 0 and far apart. Values that are not finite are left
    out.

    Args:
        title: The heading.
        lines: Values by step, by name.

    Example:
        >>> from lightning_lars.run_report.charts import line_chart
        >>> chart = line_chart("Loss", {"loss": {0: 2.0, 10: 1.0}})
        >>> "<title>loss</title>" in chart
        True
    """
    finite = {
        name: {step: value for step, value in points.items() if math.isfinite(value)}
        for name, points in lines.items()
    }
    values = [value for points in finite.values() for value in points.values()]
    if not values:
        return f"<h3>{escape(title)}</h3><p>No finite value.</p>"
    steps = [step for points in finite.values() for step in points]
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > _LOGARITHMIC
    bottom, top = (math.log10(low), math.log10(high)) if is_log else (low, high)
    if top - bottom < 1e-12 * max(1.0, abs(top)):
        bottom, top = bottom - 0.5 * (abs(bottom) or 1), top + 0.5 * (abs(top) or 1)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - 10)

    def y(value: float) -> float:
        height = math.log10(value) if is_log else value
        return _TOP + (top - height) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        height = bottom + share * (top - bottom)
        at = _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)
        number = 10**height if is_log else height
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number:.3g}</text>')
    for step in _ticks(first, last):
        parts.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{step}</text>')
    for i, (name, points) in enumerate(finite.items()):
        color = _COLORS[i % len(_COLORS)]
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points.items())
        label = f"<title>{escape(name)}</title>"
        if len(points) == 1:
            [(step, value)] = points.items()
            parts.append(
                f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" fill="{color}">{label}</circle>'
            )
        elif points:
            parts.append(f'<polyline points="{path}" stroke="{color}">{label}</polyline>')
    parts.append("</svg>")
    legend = "".join(
        f'<span><i style="background:{_COLORS[i % len(_COLORS)]}"></i>{escape(name)}</span>'
        for i, name in enumerate(finite)
    )
    scale = " (logarithmic)" if is_log else ""
    return f'<h3>{escape(title)}{scale}</h3>{"".join(parts)}<p class="legend">{legend}</p>'


def _ticks(first: int, last: int) -> Sequence[int]:
    return sorted({round(first + share * (last - first)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)})
