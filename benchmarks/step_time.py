"""Time of an optimizer step, beside torch's fused optimizers and published LARS and LAMB.

    python -m benchmarks.step_time                          # ResNet-50's layers, one thread of the CPU
    python -m benchmarks.step_time --shapes all --threads 2 --picture step_time.png
    python -m benchmarks.step_time --device cuda --shapes resnet50 bert-large

All optimizers of a floor take turns within one run, each with parameters of its own; what counts are the
ratios of the medians. Peers are installed into ``.peers/`` on first use, as by the tests. The share of
bandwidth is that of the bytes that the step must move, in two passes where it has norms, in the time that it
took, to what a copy moves, or on the CPU a multiplication in place.
"""

import argparse
import os
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.model_shapes import SHAPES, elements, parameters
from benchmarks.rivals import FLOORS, Rival, rivals
from benchmarks.timing import in_turns, memory_bandwidth

Results = dict[str, tuple[Rival, list[float]]]


def measure(name: str, rounds: int, device: str) -> Results:
    """Time every optimizer on one model's layers, first those like LARS and then those like LAMB."""
    shapes = SHAPES[name]()
    results: Results = {}
    for floor in FLOORS:
        race = {label: rival for label, rival in rivals().items() if rival.floor == floor}
        steps = {label: rival.build(parameters(shapes, device)).step for label, rival in race.items()}
        times = in_turns(steps, rounds, device, name)
        results |= {label: (rival, times[label]) for label, rival in race.items()}
    return results


def needed(name: str) -> int:
    """Return the bytes that the larger race takes: weight, gradient and two moments of each, and scratch."""
    runners = sum(rival.floor == FLOORS[1] for rival in rivals().values())
    return 4 * elements(SHAPES[name]()) * (4 * runners + 4)


def available(device: str) -> int:
    """Return how many bytes there are."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def tabulate(name: str, results: Results, bandwidth: float) -> Table:
    """Print medians, and what they are of the floor, of the best peer and of the bandwidth."""
    shapes = SHAPES[name]()
    size = elements(shapes)
    medians = {label: statistics.median(times) for label, (_, times) in results.items()}
    table = Table(title=f"{name}: {len(shapes)} tensors, {size / 1e6:.1f} M")
    for column in ("Optimizer", "Median ms", "Quartiles", "Of floor", "Of best peer", "Bytes", "Bandwidth"):
        table.add_column(column, justify="left" if column == "Optimizer" else "right")
    for label, (rival, times) in results.items():
        low, _, high = statistics.quantiles(times, n=4)
        peers = [
            medians[other]
            for other, (theirs, _) in results.items()
            if theirs.is_peer and theirs.floor == rival.floor
        ]
        table.add_row(
            label,
            f"{medians[label]:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{medians[label] / medians[rival.floor]:.2f}",
            f"{medians[label] / min(peers):.2f}" if peers else "",
            str(rival.bytes_moved),
            f"{rival.bytes_moved * size / medians[label] / bandwidth:.0%}",
        )
    return table


def draw(path: Path, results: dict[str, Results]) -> None:
    """Save bars of the medians over the floor, a panel for each model."""
    from matplotlib.figure import Figure

    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(5.5 * columns, 5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for empty in panels[len(results) :]:
        empty.set_axis_off()
    for axes, (name, of_model) in zip(panels, results.items(), strict=False):
        medians = {label: statistics.median(times) for label, (_, times) in of_model.items()}
        over_floor = [medians[label] / medians[rival.floor] for label, (rival, _) in of_model.items()]
        kinds = {True: "tab:gray", False: "tab:blue"}
        colors = [
            "black" if label in FLOORS else kinds[rival.is_peer] for label, (rival, _) in of_model.items()
        ]
        bars = axes.barh(list(of_model), over_floor, color=colors)
        axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_title(name)
        axes.set_xlabel("time of a step, of the fused SGD or AdamW")
        axes.margins(x=0.12)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read the command line and print a table for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=[*SHAPES, "all"], default=["resnet50"], help="Whose layers."
    )
    parser.add_argument("--rounds", type=int, default=15, help="Turns of each optimizer, at least 2.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of torch on the CPU.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="Where the layers are.")
    parser.add_argument("--picture", type=Path, help="Where to save a PNG of the ratios.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    bandwidth = memory_bandwidth(arguments.device)
    results = {}
    for name in SHAPES if "all" in arguments.shapes else arguments.shapes:
        if needed(name) > available(arguments.device):
            console.print(f"without {name}, which takes {needed(name) / 1e9:.0f} GB of memory")
            continue
        results[name] = measure(name, arguments.rounds, arguments.device)
        console.print(tabulate(name, results[name], bandwidth))
    how = "A copy" if arguments.device == "cuda" else "A multiplication in place"
    console.print(f"{how} moves {bandwidth / 1e6:.1f} GB/s.")
    if arguments.picture and results:
        draw(arguments.picture, results)


if __name__ == "__main__":
    main()
