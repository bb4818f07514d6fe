"""Time of an optimizer step, compared with torch's fused optimizers and published LARS and LAMB.

    python -m benchmarks.step_time                          # ResNet-50's layers, one thread of the CPU
    python -m benchmarks.step_time --shapes all --threads 2 --picture step_time.png
    python -m benchmarks.step_time --device cuda --shapes resnet50 bert-large

All optimizers with the same baseline (fused SGD or AdamW) take turns within one run, each with its own
parameters; compare the ratios of the medians. Peers are installed into ``.peers/`` on first use, as by the
tests. The bandwidth column is the rate at which the step moves the bytes that it must, in two passes if it
needs norms, relative to the rate of a copy, or on the CPU of an in-place multiplication.
"""

import argparse
import os
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.model_shapes import SHAPES, elements, parameters
from benchmarks.peers import BASELINES, Candidate, candidates
from benchmarks.timing import in_turns, memory_bandwidth

Results = dict[str, tuple[Candidate, list[float]]]


def measure(name: str, rounds: int, device: str) -> Results:
    """Time every optimizer on one model's layers, first the LARS group and then the LAMB group."""
    shapes = SHAPES[name]()
    results: Results = {}
    for baseline in BASELINES:
        group = {label: each for label, each in candidates().items() if each.baseline == baseline}
        steps = {label: each.build(parameters(shapes, device)).step for label, each in group.items()}
        times = in_turns(steps, rounds, device, name)
        results |= {label: (candidate, times[label]) for label, candidate in group.items()}
    return results


def needed(name: str) -> int:
    """Return the bytes that the LAMB group takes: weight, gradient and two moments each, and scratch."""
    count = sum(candidate.baseline == BASELINES[1] for candidate in candidates().values())
    return 4 * elements(SHAPES[name]()) * (4 * count + 4)


def available(device: str) -> int:
    """Return the total memory in bytes."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def tabulate(name: str, results: Results, bandwidth: float) -> Table:
    """Tabulate medians, relative to the baseline and the fastest peer, and the bandwidth."""
    shapes = SHAPES[name]()
    size = elements(shapes)
    medians = {label: statistics.median(times) for label, (_, times) in results.items()}
    table = Table(title=f"{name}: {len(shapes)} tensors, {size / 1e6:.1f} M")
    numbers = ("Median ms", "Quartiles", "x fused SGD, AdamW", "x fastest peer", "Bytes", "Bandwidth")
    for column in ("Optimizer", *numbers):
        table.add_column(column, justify="left" if column == "Optimizer" else "right")
    for label, (candidate, times) in results.items():
        low, _, high = statistics.quantiles(times, n=4)
        peers = [
            medians[other]
            for other, (theirs, _) in results.items()
            if theirs.is_peer and theirs.baseline == candidate.baseline
        ]
        table.add_row(
            label,
            f"{medians[label]:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{medians[label] / medians[candidate.baseline]:.2f}",
            f"{medians[label] / min(peers):.2f}" if peers else "",
            str(candidate.bytes_moved),
            f"{candidate.bytes_moved * size / medians[label] / bandwidth:.0%}",
        )
    return table


def draw(path: Path, results: dict[str, Results]) -> None:
    """Save bars of the medians relative to the baseline, a panel for each model."""
    from matplotlib.figure import Figure

    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(5.5 * columns, 5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for empty in panels[len(results) :]:
        empty.set_axis_off()
    for axes, (name, of_model) in zip(panels, results.items(), strict=False):
        medians = {label: statistics.median(times) for label, (_, times) in of_model.items()}
        over_baseline = [
            medians[label] / medians[candidate.baseline] for label, (candidate, _) in of_model.items()
        ]
        kinds = {True: "tab:gray", False: "tab:blue"}
        colors = [
            "black" if label in BASELINES else kinds[candidate.is_peer]
            for label, (candidate, _) in of_model.items()
        ]
        bars = axes.barh(list(of_model), over_baseline, color=colors)
        axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_title(name)
        axes.set_xlabel("time of a step, x fused SGD or AdamW")
        axes.margins(x=0.12)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read the command line and print a table for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=[*SHAPES, "all"],
        default=["resnet50"],
        help="Models whose layers to step.",
    )
    parser.add_argument("--rounds", type=int, default=15, help="Rounds, at least 2.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="Device of the layers.")
    parser.add_argument("--picture", type=Path, help="Where to save a PNG of the ratios.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    bandwidth = memory_bandwidth(arguments.device)
    results = {}
    for name in SHAPES if "all" in arguments.shapes else arguments.shapes:
        if needed(name) > available(arguments.device):
            console.print(f"skipping {name}, which takes {needed(name) / 1e9:.0f} GB of memory")
            continue
        results[name] = measure(name, arguments.rounds, arguments.device)
        console.print(tabulate(name, results[name], bandwidth))
    how = "A copy" if arguments.device == "cuda" else "An in-place multiplication"
    console.print(f"{how} moves {bandwidth / 1e6:.1f} GB/s.")
    if arguments.picture and results:
        draw(arguments.picture, results)


if __name__ == "__main__":
    main()
