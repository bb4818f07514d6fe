"""The memory, time and accuracy of 8-bit optimizer state.

    python -m benchmarks.eight_bit_training                       # Fashion-MNIST, three seeds, a few minutes
    python -m benchmarks.eight_bit_training --seeds 1 --train-images 2000

Prints the memory of the state and the time of a step for the layers of ResNet-50, in 8 and in 32 bits, and
the test accuracy of a small network with batch norm, trained by both from the same start on the same batches.
"""

import argparse
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from benchmarks.model_shapes import SHAPES, parameters
from benchmarks.timing import in_turns
from examples.images import FASHION_MNIST, batches, fashion_mnist, network
from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit, WarmupDecayLR, build_optimizer

PAIRS = {"LARS": (LARS, LARS8bit, 5.0), "LAMB": (LAMB, LAMB8bit, 0.02)}


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of an optimizer's state, including scales and codebooks."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    parts = [getattr(value, name, None) for value in values for name in ("codes", "scale", "qmap")]
    plain = [value for value in values if not hasattr(value, "codes")]
    return sum(part.untyped_storage().nbytes() for part in [*plain, *parts] if part is not None)


def weigh(shapes: str, rounds: int) -> Table:
    """Compare memory and time of steps on one model's layers."""
    table = Table(title=f"{shapes}, in 32 bits and in 8")
    for column in ("Optimizer", "State, MB", "8-bit", "Ratio", "Step, ms", "8-bit", "Ratio"):
        table.add_column(column, justify="left" if column == "Optimizer" else "right")
    for name, (plain, eight_bit, _) in PAIRS.items():
        ready = {each: each(parameters(SHAPES[shapes](), "cpu")) for each in (plain, eight_bit)}
        steps = {each.__name__: optimizer.step for each, optimizer in ready.items()}
        times = in_turns(steps, rounds, "cpu", name)
        sizes = [state_bytes(optimizer) / 1e6 for optimizer in ready.values()]
        medians = [statistics.median(of_each) for of_each in times.values()]
        numbers = (f"{sizes[0]:.1f}", f"{sizes[1]:.1f}", f"{sizes[1] / sizes[0]:.3f}")
        table.add_row(
            name, *numbers, f"{medians[0]:.0f}", f"{medians[1]:.0f}", f"{medians[1] / medians[0]:.0f}"
        )
    return table


def accuracy(optimizer_class: type, lr: float, seed: int, epochs: int, data: list[TensorDataset]) -> float:
    """Train from a seed and return the test accuracy in percent."""
    train, test = data
    torch.manual_seed(seed)
    net = network(28)
    loader = batches(train, 512, shuffle=True)
    optimizer = build_optimizer(net, optimizer_class, lr=lr, weight_decay=1e-4)
    schedule = WarmupDecayLR(optimizer, len(loader) * epochs // 10, len(loader) * epochs)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        right = sum((net(x).argmax(1) == y).sum().item() for x, y in batches(test, 1000, shuffle=False))
    return 100 * right / len(test)


def compare(seeds: int, epochs: int, data: list[TensorDataset]) -> Table:
    """Train every pair from every seed and tabulate test accuracies."""
    table = Table(title=f"Test accuracy in percent, {seeds} seeds, {epochs} epochs")
    for column in ("Optimizer", "32-bit", "8-bit", "Difference of means"):
        table.add_column(column, justify="left" if column == "Optimizer" else "right")
    runs = [
        (name, each, lr, seed)
        for name, (*both, lr) in PAIRS.items()
        for each in both
        for seed in range(seeds)
    ]
    results: dict[tuple[str, type], list[float]] = {}
    for name, each, lr, seed in track(runs, description="training", transient=True):
        results.setdefault((name, each), []).append(accuracy(each, lr, seed, epochs, data))
    for name, (*both, _) in PAIRS.items():
        plain, eight_bit = (results[name, each] for each in both)
        difference = statistics.mean(eight_bit) - statistics.mean(plain)
        lists = (", ".join(f"{value:.2f}" for value in values) for values in (plain, eight_bit))
        table.add_row(name, *lists, f"{difference:+.2f}")
    return table


def main() -> None:
    """Read the command line and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="The folder with Fashion-MNIST.")
    parser.add_argument("--seeds", type=int, default=3, help="Runs per optimizer.")
    parser.add_argument("--epochs", type=int, default=2, help="Passes over the images.")
    parser.add_argument("--train-images", type=int, default=60_000, help="Training images to use.")
    parser.add_argument(
        "--shapes", choices=list(SHAPES), default="resnet50", help="Model whose layers to compare."
    )
    parser.add_argument("--rounds", type=int, default=5, help="Timed steps per optimizer.")
    arguments = parser.parse_args()
    train, test = fashion_mnist(arguments.data_dir)
    console = Console()
    console.print(weigh(arguments.shapes, arguments.rounds))
    data = [TensorDataset(*train[: arguments.train_images]), test]
    console.print(compare(arguments.seeds, arguments.epochs, data))


if __name__ == "__main__":
    main()
