"""Tables, CSV files and plots of the GPU recipe."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import rich
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.table import Table
from study_report import COLORS

Row = dict[str, str | int | float]
"""Optimizer, batch size, seed, steps, seconds, and last the metric, under its name."""


def report(title: str, rows: Sequence[Row], folder: Path) -> None:
    """Print the rows, aggregated over seeds, and save them as a plot."""
    metric = list(rows[0])[-1]
    runs: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        runs.setdefault((row["optimizer"], row["batch"]), []).append(row)
    table = Table(title=title)
    for name in ("optimizer", "batch", "steps", "seconds", metric):
        table.add_column(name, justify="left" if name == "optimizer" else "right")
    for (optimizer, batch_size), seeds in runs.items():
        values = [row[metric] for row in seeds]
        spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        table.add_row(
            optimizer,
            f"{batch_size:,}",
            f"{seeds[0]['steps']:,}",
            f"{statistics.mean(row['seconds'] for row in seeds):.1f}",
            f"{statistics.mean(values):.3f}{spread}",
        )
    rich.print(table)
    draw(title, metric, runs, path_of(title, folder).with_suffix(".png"))


def save(title: str, rows: Sequence[Row], folder: Path) -> None:
    """Save the rows individually as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    with path_of(title, folder).with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def path_of(title: str, folder: Path) -> Path:
    """Return the path of the files of a part, without a suffix."""
    return folder / title.lower().replace(" ", "_")


def draw(title: str, metric: str, runs: Mapping[tuple[str, int], Sequence[Row]], path: Path) -> None:
    """Plot the metric over the batch size: every seed, and a line through the means of each optimizer."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(dict.fromkeys(optimizer for optimizer, _ in runs)):
        color = COLORS[name.removeprefix("Nesterov ")]
        values = {
            size: [row[metric] for row in rows]
            for (optimizer, size), rows in runs.items()
            if optimizer == name
        }
        offset = 1.04**index  # so that the points do not overlap
        means = [statistics.mean(each) for each in values.values()]
        axes.plot([offset * size for size in values], means, "_-", color=color, markersize=14, label=name)
        for size, each in values.items():
            axes.plot([offset * size] * len(each), each, "o", color=color, alpha=0.6, markeredgewidth=0)
    sizes = sorted({size for _, size in runs})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("batch")
    axes.set_ylabel(metric)
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=120)
