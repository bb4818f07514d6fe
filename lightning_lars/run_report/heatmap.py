"""Heatmaps of layers over steps, drawn by a script in the page, with the name and the value on hover."""

import json
import math
from collections.abc import Mapping
from html import escape

from lightning_lars.run_report.run import Points

MOST_COLUMNS = 400
"""Longer runs are sampled at evenly spaced steps."""

SCRIPT = """
const STOPS = [[68,1,84],[59,82,139],[33,145,140],[94,201,98],[253,231,37]];
function color(share) {
  const at = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1), low = Math.min(Math.floor(at), 3);
  const mixed = STOPS[low].map((value, i) => value + (at - low) * (STOPS[low + 1][i] - value));
  return `rgb(${mixed.map(Math.round).join(",")})`;
}
for (const figure of document.querySelectorAll("figure.heatmap")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const canvas = figure.querySelector("canvas"), tip = figure.querySelector("output");
  const rows = data.layers.length, columns = data.steps.length;
  const height = Math.max(3, Math.min(16, Math.floor(800 / rows)));
  canvas.width = Math.max(columns, Math.floor(640 / columns) * columns);
  canvas.height = rows * height;
  canvas.style.height = canvas.height + "px";
  const width = canvas.width / columns, context = canvas.getContext("2d");
  const [low, high] = data.limits.map(Math.log);
  data.values.forEach((row, i) => row.forEach((value, j) => {
    if (value === null) return;
    context.fillStyle = value === "inf" ? "#d7191c" : color((Math.log(value) - low) / (high - low));
    context.fillRect(j * width, i * height, Math.ceil(width), height);
  }));
  const names = figure.querySelector("ol");
  data.layers.forEach((name, i) => {
    const item = document.createElement("li");
    item.style.height = height + "px";
    item.textContent = height >= 10 || i % Math.ceil(12 / height) === 0 ? name : "";
    item.title = name;
    names.append(item);
  });
  canvas.addEventListener("mousemove", event => {
    const box = canvas.getBoundingClientRect();
    const j = Math.min(columns - 1, Math.floor((event.clientX - box.left) / box.width * columns));
    const i = Math.min(rows - 1, Math.floor((event.clientY - box.top) / box.height * rows));
    if (i < 0 || j < 0) return;
    const value = data.values[i][j];
    const text = value === null ? "no value" : value === "inf" ? "not finite" : value;
    tip.textContent = `${data.layers[i]}, step ${data.steps[j]}: ${text}`;
  });
}
"""


def heatmap(title: str, layers: Mapping[str, Points]) -> str:
    """Return a heatmap, with colors on a logarithmic scale from the 1st to the 99th percentile.

    Gray cells have no value above 0, red ones a value that is not finite.

    Args:
        title: The heading.
        layers: Values by step, by layer.

    Example:
        >>> from lightning_lars.run_report.heatmap import heatmap
        >>> "conv.weight" in heatmap("Trust ratio", {"conv.weight": {0: 0.5, 10: 0.25}})
        True
    """
    steps = sorted({step for points in layers.values() for step in points})
    steps = steps[:: max(1, math.ceil(len(steps) / MOST_COLUMNS))]
    shown = sorted(
        value for points in layers.values() for value in points.values() if math.isfinite(value) and value > 0
    )
    low, high = (shown[round(share * (len(shown) - 1))] for share in (0.01, 0.99)) if shown else (0.1, 1.0)
    if high <= 1.5 * low:
        low, high = low / 1.5, high * 1.5
    data = {
        "layers": list(layers),
        "steps": steps,
        "values": [[_cell(points.get(step)) for step in steps] for points in layers.values()],
        "limits": [low, high],
    }
    # The end of a script must not appear in a name.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<h3>{escape(title)}</h3><figure class="heatmap"><ol></ol><canvas></canvas>'
        f'<script type="application/json">{text}</script>'
        f'<figcaption><span class="scale"></span>{low:.3g} to {high:.3g}, steps {steps[0]} to {steps[-1]}. '
        "<output>Point at a cell.</output></figcaption></figure>"
    )


def _cell(value: float | None) -> float | str | None:
    if value is None:
        return None
    if not math.isfinite(value):
        return "inf"
    return float(f"{value:.4g}") if value > 0 else None
