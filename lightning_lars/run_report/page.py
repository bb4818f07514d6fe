"""The report of a run as one HTML page, which loads nothing."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from lightning_lars.run_report.charts import line_chart
from lightning_lars.run_report.heatmap import SCRIPT, heatmap
from lightning_lars.run_report.notes import SHARES, notes
from lightning_lars.run_report.run import Points, Run

MOST_CHARTS = 24
"""Further metrics are listed without a chart."""
_TITLES = {
    "trust_ratio": "Trust ratio",
    "effective_lr": "Effective learning rate",
    "update_to_weight": "Update-to-weight ratio",
    "gradient_norm": "Gradient norm",
}
_SUMMARY = ("/min", "/median", "/max")
# In the order of the fields.
_GROUP = ("Optimizer", "Group", "Tensors", "Elements", "Peak lr", "Weight decay", "Layer adaptation")
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
h3 { margin: 1.2rem 0 .3rem; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: #555; }
polyline { fill: none; stroke-width: 1.6; } polyline:hover { stroke-width: 4; } .grid { stroke: #e4e4e4; }
.legend { margin: 0; font-size: 13px; } .legend span { margin-right: 1.2em; display: inline-block; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
table { border-collapse: collapse; }
td, th { text-align: left; padding: .15rem .9rem .15rem 0; vertical-align: top; }
th { border-bottom: 1px solid #bbb; } td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
figure.heatmap { margin: 0; display: grid; column-gap: .5rem; }
figure.heatmap { grid-template-columns: minmax(0, 15rem) 1fr; }
figure.heatmap ol { list-style: none; margin: 0; padding: 0; font-size: 11px; text-align: right; }
figure.heatmap li { overflow: visible; white-space: nowrap; line-height: 1; direction: rtl; }
figure.heatmap canvas { background: #ebebeb; width: 100%; image-rendering: pixelated; }
figcaption { grid-column: 2; font-size: 13px; } output { font-weight: 600; }
.scale { display: inline-block; width: 8em; height: .8em; margin-right: .5em;
  background: linear-gradient(90deg, #440154, #3b528b, #21918c, #5ec962, #fde725); }
li.note { color: #a40000; }
"""


def page(run: Run, title: str) -> str:
    """Return the page.

    Args:
        run: The data of the run.
        title: The heading.

    Example:
        >>> from lightning_lars.run_report.page import page
        >>> from lightning_lars.run_report.run import Run
        >>> page(Run(metrics={"loss": {0: 2.0, 10: 1.0}}), "A run")[:15]
        '<!doctype html>'
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"{''.join(_sections(run))}<script>{SCRIPT}</script></body></html>\n"
    )


def save_page(run: Run, title: str, path: Path) -> None:
    """Write the page to a file, whose folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # What is no text, such as half of a surrogate pair from a file name, is escaped.
    path.write_text(page(run, title), encoding="utf-8", errors="backslashreplace")


def _sections(run: Run) -> Iterator[str]:
    found = "".join(f'<li class="note">{escape(sentence)}</li>' for sentence in notes(run))
    yield f"<h2>What stands out</h2>{f'<ul>{found}</ul>' if found else '<p>Nothing in these numbers.</p>'}"
    rest = dict(run.metrics)
    rates = _take(rest, "lr-")
    if rates:
        yield f"<h2>Learning rates</h2>{line_chart('Learning rate of each group', rates)}"
    of_layers = [
        part
        for quantity, name in _TITLES.items()
        for part in _of_layers(name, _take(rest, f"{quantity}/", _SUMMARY), run.layers.get(quantity, {}))
    ]
    _take(rest, "trust_ratio/", tuple(f"/{share}" for share in SHARES))
    if of_layers:
        yield f"<h2>Layers</h2>{''.join(of_layers)}"
    noise = _take(rest, "gradient_noise_scale/")
    if noise:
        yield "<h2>Gradient noise scale</h2>"
        for key, points in noise.items():
            yield line_chart(key.removeprefix("gradient_noise_scale/"), {key: points})
    if rest:
        yield "<h2>Metrics</h2>"
        for key, points in list(rest.items())[:MOST_CHARTS]:
            yield line_chart(key, {key: points})
        hidden = list(rest)[MOST_CHARTS:]
        if hidden:
            yield f"<p>Not shown: {escape(', '.join(hidden))}.</p>"
    if run.groups:
        rows = [list(vars(each).values()) for each in run.groups]
        yield f"<h2>Parameter groups</h2>{_table(_GROUP, rows)}"
    if run.settings:
        yield f"<h2>Settings</h2>{_table(('Name', 'Value'), list(run.settings.items()))}"


def _of_layers(name: str, summary: dict[str, Points], layers: Mapping[str, Points]) -> Iterator[str]:
    if summary:
        yield line_chart(f"{name}, over all layers", summary)
    if any(layers.values()):
        yield heatmap(f"{name} of each layer", layers)


def _take(metrics: dict[str, Points], prefix: str, suffixes: tuple[str, ...] = ("",)) -> dict[str, Points]:
    taken = [key for key in metrics if key.startswith(prefix) and key.endswith(suffixes)]
    return {key: metrics.pop(key) for key in taken}


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
