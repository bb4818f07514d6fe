"""Tables and pictures of the large-batch study."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from rich.table import Table
from study_training import Choice, Outcome, Run

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = {"SGD": "tab:blue", "AdamW": "tab:gray", "LARS": "tab:red", "LAMB": "tab:orange"}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the result: runs that differ in their seed alone."""

    name: str
    runs: Sequence[Run]
    outcomes: Sequence[Outcome]

    @property
    def accuracies(self) -> list[float]:
        """Accuracy on the test images, in percent, seed by seed."""
        return [outcome.test for outcome in self.outcomes if outcome.test is not None]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)


@dataclasses.dataclass(frozen=True)
class Window:
    """The rates around a best one at which accuracy does not fall below a bound; open where the grid ends."""

    low: float
    high: float
    is_open: bool

    def __str__(self) -> str:
        at_least = "at least " if self.is_open else ""
        return f"{self.low:.3g} to {self.high:.3g}, {at_least}{self.high / self.low:.1f} times"


def window(accuracy: Mapping[float, float], bound: float) -> Window | None:
    """Return the rates around the best one, without a gap, at which accuracy is at least the bound.

    Between two rates, accuracy is taken to be linear in the logarithm of the rate. None where no rate reaches
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


def table_of_choices(
    seen: Mapping[Choice, float], best: Mapping[str, Choice], ends: Mapping[str, tuple[float, float]]
) -> Table:
    batch_size = next(iter(seen)).batch_size
    table = Table(
        "Optimizer", "lr", "Excluded lr", "Option", "Validation %", "", title=f"At batch {batch_size}"
    )
    for choice, accuracy in seen.items():
        chosen = choice == best[choice.optimizer]
        at_end = " (end of the grid)" if chosen and choice.lr in ends[choice.optimizer] else ""
        table.add_row(
            choice.optimizer,
            f"{choice.lr:g}",
            f"x {choice.excluded_lr_scale:g}",
            ", ".join(f"{key}={value}" for key, value in choice.options),
            f"{accuracy:.2f}",
            f"chosen{at_end}" if chosen else "",
            style="bold" if chosen else None,
        )
    return table


def table_of_results(rows: Sequence[Row]) -> Table:
    table = Table(title=f"Test accuracy, {len(rows[0].runs)} seeds")
    for name in ("Row", "Batch", "Steps", "Peak lr", "Test %", "Behind the first"):
        table.add_column(name, justify="left" if name == "Row" else "right")
    for row in rows:
        run, outcome = row.runs[0], row.outcomes[0]
        table.add_row(
            row.name,
            f"{run.batch_size}",
            f"{outcome.steps}",
            f"{outcome.peak_lr:.3g}",
            f"{row.mean:.2f}{_spread(row.accuracies)}",
            f"{rows[0].mean - row.mean:.2f}" if row is not rows[0] else "",
        )
    return table


def _spread(values: Sequence[float]) -> str:
    return f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""


def table_of_windows(found: Mapping[str, Mapping[float, float]], batch_size: int) -> Table:
    table = Table(
        *("Optimizer", "Best %", "At lr", "Within 1 point of it", "No worse than the best of SGD"),
        title=f"Learning rates at batch {batch_size}, validation images",
    )
    for name, accuracy in found.items():
        best = max(accuracy, key=accuracy.__getitem__)
        reaching = window(accuracy, max(found["SGD"].values()))
        table.add_row(
            name,
            f"{accuracy[best]:.2f}",
            f"{best:g}",
            str(window(accuracy, accuracy[best] - 1)),
            "" if name == "SGD" else str(reaching or "none"),
        )
    return table


def table_of_factors(
    found: Mapping[int, Mapping[float, float]], base: int, predicted: Mapping[int, float]
) -> Table:
    table = Table(
        *(
            "Batch",
            "Linear factor",
            "Validation %",
            "Best factor",
            "Validation %",
            "By the noise scale",
        ),
        title=f"SGD: multiples of the learning rate of batch {base}",
    )
    for size, accuracy in found.items():
        best = max(accuracy, key=accuracy.__getitem__)
        table.add_row(
            f"{size}",
            f"{size / base:g}",
            f"{accuracy[size / base]:.2f}",
            f"{best:g}",
            f"{accuracy[best]:.2f}",
            f"{predicted[size]:.2f}",
        )
    return table


def plot_results(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw every seed of every row, in the order of the table."""
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1.4), layout="constrained")
    lowest = math.floor(rows[0].mean - 4)
    for index, row in enumerate(rows):
        color = COLORS[row.runs[0].choice.optimizer]
        inside = [each for each in row.accuracies if each >= lowest]
        axes.plot(inside, [index] * len(inside), "o", color=color, alpha=0.5, markeredgewidth=0)
        if row.mean >= lowest:
            axes.plot(row.mean, index, "|", color=color, markersize=18, markeredgewidth=2)
        else:
            axes.text(lowest + 0.05, index, f"← {row.mean:.1f}", color=color, va="center")
    axes.axvline(rows[0].mean, color="black", linewidth=0.5)
    axes.set_xlim(lowest, math.ceil(rows[0].mean) + 0.5)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    batch_size = rows[-1].runs[0].batch_size
    axes.set_xlabel("Accuracy on the test images, %: seeds and their mean")
    axes.set_title(f"Fashion-MNIST, {title}: from batch {rows[0].runs[0].batch_size} to {batch_size}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_windows(found: Mapping[str, Mapping[float, float]], batch_size: int, path: Path) -> None:
    """Draw accuracy over the learning rate, as a multiple of each optimizer's best."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, accuracy in found.items():
        best = max(accuracy, key=accuracy.__getitem__)
        within = window(accuracy, accuracy[best] - 1)
        assert within is not None
        axes.plot(
            [rate / best for rate in accuracy],
            list(accuracy.values()),
            "o-",
            color=COLORS[name],
            label=f"{name}, best {accuracy[best]:.1f} % at {best:g}; within 1 point: {within}",
        )
    top = max(max(accuracy.values()) for accuracy in found.values())
    axes.set_ylim(top - 10, top + 0.5)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("Learning rate, as a multiple of the optimizer's best")
    axes.set_ylabel("Accuracy on the validation images, %")
    axes.set_title(f"Learning rates at batch {batch_size}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_factors(
    found: Mapping[int, Mapping[float, float]],
    base: int,
    predicted: Mapping[int, float],
    noise_scale: float,
    path: Path,
) -> None:
    """Draw the multiples of the small batch's rate that are within a point of the best, by batch size."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    sizes = list(found)
    windows = [window(found[size], max(found[size].values()) - 1) for size in sizes]
    axes.fill_between(
        sizes,
        [each.low for each in windows if each],
        [each.high for each in windows if each],
        color="tab:blue",
        alpha=0.2,
        label="within 1 point of the best",
    )
    best = [max(found[size], key=found[size].__getitem__) for size in sizes]
    axes.plot(sizes, best, "o", color="tab:blue", label="best on the grid")
    axes.plot(sizes, [size / base for size in sizes], "k:", label="linear rule")
    axes.plot(sizes, [math.sqrt(size / base) for size in sizes], "k--", label="square-root rule")
    axes.plot(sizes, [predicted[size] for size in sizes], color="tab:green", label="by the noise scale")
    axes.axvline(noise_scale, color="tab:green", linewidth=0.7)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, [f"{size}" for size in sizes])
    axes.set_xlabel("Batch size (green line: the noise scale)")
    axes.set_ylabel(f"Multiple of the rate of batch {base}")
    axes.set_title("SGD: how the best learning rate grows with the batch")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
