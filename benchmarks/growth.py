"""How the time of a step grows with the number of parameters and of layers.

    python -m benchmarks.growth --picture growth.png

Measures 16 layers of increasing size, and an increasing number of layers of 4,096 parameters.
"""

import argparse
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.optim import SGD, AdamW

from benchmarks.model_shapes import Shape, grouped, parameters
from benchmarks.timing import in_turns
from lightning_lars import LAMB, LARS

OPTIMIZERS = {
    "SGD(fused=True)": lambda params: SGD(params, lr=1.0, momentum=0.9, weight_decay=1e-4, fused=True),
    "LARS": lambda params: LARS(grouped(params), weight_decay=1e-4),
    "AdamW(fused=True)": lambda params: AdamW(params, lr=1e-3, weight_decay=0.01, fused=True),
    "LAMB": lambda params: LAMB(grouped(params)),
}


def larger(most: int) -> dict[int, list[Shape]]:
    """Return 16 layers of 2**14 parameters in total, and repeatedly four times as many, up to ``2**most``."""
    return {2**power: [(16, 2 ** (power - 8))] * 16 for power in range(14, most + 1, 2)}


def more(most: int) -> dict[int, list[Shape]]:
    """Return one layer, and repeatedly four times as many, up to ``2**most``."""
    return {2**power: [(64, 64)] * 2**power for power in range(0, most + 1, 2)}


def measure(title: str, models: dict[int, list[Shape]], rounds: int, device: str) -> dict[str, list[float]]:
    """Return the median of a step in milliseconds for each model, by optimizer."""
    medians: dict[str, list[float]] = {label: [] for label in OPTIMIZERS}
    for number, shapes in models.items():
        steps = {label: build(parameters(shapes, device)).step for label, build in OPTIMIZERS.items()}
        for label, times in in_turns(steps, rounds, device, f"{number:,} {title}").items():
            medians[label].append(statistics.median(times))
    return medians


def draw(path: Path, series: dict[str, tuple[list[int], dict[str, list[float]]]]) -> None:
    """Save a line for each optimizer, over parameters and over layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (title, (numbers, medians)) in zip(figure.subplots(1, 2), series.items(), strict=True):
        for label, times in medians.items():
            axes.loglog(numbers, times, "o-", label=label)
        axes.set_xlabel(title)
        axes.set_ylabel("ms per step")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read the command line, and print a table for each way to grow."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="Rounds.")
    parser.add_argument("--most-parameters", type=int, default=24, help="As a power of 2.")
    parser.add_argument("--most-layers", type=int, default=12, help="As a power of 2.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="Device of the layers.")
    parser.add_argument("--picture", type=Path, help="Where to save a PNG.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    series = {}
    for title, models in (
        ("parameters in 16 layers", larger(arguments.most_parameters)),
        ("layers of 4,096 parameters", more(arguments.most_layers)),
    ):
        medians = measure(title, models, arguments.rounds, arguments.device)
        table = Table("Number", *OPTIMIZERS, title=f"Median ms over {title}")
        for i, number in enumerate(models):
            table.add_row(f"{number:,}", *(f"{medians[label][i]:.3f}" for label in OPTIMIZERS))
        console.print(table)
        series[title] = (list(models), medians)
    if arguments.picture:
        draw(arguments.picture, series)


if __name__ == "__main__":
    main()
