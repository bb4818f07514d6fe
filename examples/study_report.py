"""Tables and plots of the large-batch study."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from rich.table import Table
from study_training import Choice, Outcome, Run

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = {
    "SGD": "tab:blue",
    "Plain SGD": "lightsteelblue",
    "AdamW": "tab:gray",
    "LARS": "tab:red",
    "LAMB": "tab:orange",
    "Bounded LAMB": "tab:purple",
    "Muon": "tab:green",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the results: runs that differ only in their seed."""

    name: str
    runs: Sequence[Run]
    outcomes: Sequence[Outcome]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy in percent, for each seed."""
        return [outcome.test for outcome in self.outcomes]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)


@dataclasses.dataclass(frozen=True)
class Window:
    """The range of rates around the best one with accuracy above a bound; open where the grid ends."""

    low: float
    high: float
    is_open: bool

    def __str__(self) -> str:
        at_least = "at least " if self.is_open else ""
        return f"{self.low:.3g} to {self.high:.3g}, {at_least}{self.high / self.low:.1f} times"


def window(accuracy: Mapping[float, float], bound: float) -> Window | None:
    """Return the contiguous range of rates around the best one with an accuracy of at least the bound.

    Between two rates, accuracy is interpolated linearly in the logarithm of the rate. None if no rate reaches
    the bound.
    """
    rates = sorted(accuracy)
    best = max(rates, key=accuracy.__getitem__)
    if accuracy[best] < bound:
        return None

    def end(outward: Sequence[float]) -> tuple[float, bool]:
        inside = best
        for rate in outward:
            if accuracy[rate] < bound:
                share = (accuracy[inside] - bound) / (accuracy[inside] - accuracy[rate])
                return inside * (rate / inside) ** share, False
            inside = rate
        return inside, True

    at = rates.index(best)
    (low, open_below), (high, open_above) = end(rates[:at][::-1]), end(rates[at + 1 :])
    return Window(low, high, open_below or open_above)


def table_of_choices(model: str, seen: Mapping[Choice, float], best: Mapping[str, Choice]) -> Table:
    batch_size = next(iter(seen)).batch_size
    columns = ("Optimizer", "lr", "Norms and biases", "Clip", "Validation %")
    table = Table(*columns, title=f"{model} at batch {batch_size}")
    for choice, accuracy in seen.items():
        table.add_row(*_cells(choice), f"{accuracy:.2f}")
    for choice in best.values():
        table.add_row(*_cells(choice), "chosen", style="bold")
    return table


def _cells(choice: Choice) -> tuple[str, str, str, str]:
    excluded = "the same" if choice.excluded_lr is None else f"{choice.excluded_lr:g}"
    return choice.optimizer, f"{choice.lr:.4g}", excluded, "" if choice.clip is None else f"{choice.clip:g}"


def table_of_results(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=f"{title}: test accuracy, {len(rows[0].runs)} seed{'s' * (len(rows[0].runs) != 1)}")
    for name in ("", "Batch", "Steps", "Peak lr", "Weight decay", "Train loss", "Test %", "Behind the first"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        run, outcome = row.runs[0], row.outcomes[0]
        table.add_row(
            row.name,
            f"{run.batch_size}",
            f"{outcome.steps}",
            f"{outcome.peak_lr:.3g}",
            f"{outcome.weight_decay:.3g}",
            f"{statistics.mean(each.train_loss for each in row.outcomes):.3f}",
            f"{row.mean:.2f}{_spread(row.accuracies)}",
            f"{rows[0].mean - row.mean:.2f}" if row is not rows[0] else "",
        )
    return table


def _spread(values: Sequence[float]) -> str:
    return f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""


def table_of_windows(rows: Sequence[Row]) -> Table:
    means = _by_rate(rows)
    columns = ("", "Best %", "At lr", "Within 1 point of it", "Above plain SGD", "Above SGD", "Lowest %")
    batch_size = rows[0].runs[0].batch_size
    table = Table(*columns, title=f"Learning rates at batch {batch_size}, validation images")
    for name, accuracy in means.items():
        best = max(accuracy, key=accuracy.__getitem__)
        reaching = [
            ""
            if name == other or other not in means
            else str(window(accuracy, max(means[other].values())) or "none")
            for other in ("Plain SGD", "SGD")
        ]
        table.add_row(
            name,
            f"{accuracy[best]:.2f}",
            f"{best:.3g}",
            str(window(accuracy, accuracy[best] - 1)),
            *reaching,
            f"{min(accuracy.values()):.1f}",
        )
    return table


def _by_rate(rows: Sequence[Row]) -> dict[str, dict[float, float]]:
    """Return the mean validation accuracy of every optimizer by its learning rate."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        mean = statistics.mean(outcome.validation for outcome in row.outcomes)
        found.setdefault(row.name, {})[row.outcomes[0].peak_lr] = mean
    return found


def plot_sizes(rows: Sequence[Row], path: Path, epochs: int) -> None:
    """Plot accuracy over the batch size: every seed, and a line through the means."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    top = max(row.mean for row in rows)
    axes.set_ylim(top - 12, top + 1)
    for name in dict.fromkeys(row.name for row in rows):
        of = [row for row in rows if row.name == name]
        sizes = [row.runs[0].batch_size for row in of]
        axes.plot(sizes, [row.mean for row in of], "-", color=COLORS[name], label=name)
        for row, size in zip(of, sizes, strict=True):
            xs = [size] * len(row.runs)
            axes.plot(xs, row.accuracies, "o", color=COLORS[name], markersize=4, alpha=0.5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{row.runs[0].batch_size:,}\n{row.outcomes[0].steps:,} steps" for row in of])
    axes.set_xlabel("Batch size")
    axes.set_ylabel("Accuracy on the test images, %")
    axes.set_title(
        f"{epochs} epoch{'s' * (epochs != 1)} at every batch size, everything chosen at batch {sizes[0]}"
    )
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_windows(rows: Sequence[Row], path: Path) -> None:
    """Plot accuracy over the learning rate, relative to each optimizer's best."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    means = _by_rate(rows)
    for name, accuracy in means.items():
        best = max(accuracy, key=accuracy.__getitem__)
        axes.plot(
            [rate / best for rate in accuracy],
            list(accuracy.values()),
            "o-",
            color=COLORS.get(name, "lightsalmon"),
            label=f"{name}, best {accuracy[best]:.1f} % at {best:.3g}",
        )
    top = max(max(accuracy.values()) for accuracy in means.values())
    axes.set_ylim(top - 10, top + 0.5)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("Learning rate, as a multiple of the optimizer's best")
    axes.set_ylabel("Accuracy on the validation images, %")
    axes.set_title(f"Learning rates at batch {rows[0].runs[0].batch_size}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
