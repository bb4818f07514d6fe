"""What torch.compile gains in training: for the network, the optimizer's step, and both.

    python -m benchmarks.compiled_training

The variants train a small CNN in turns, batch by batch, and are compiled before they are timed. Needs a C++
compiler.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from lightning_lars import LAMB, LARS, build_optimizer


def network() -> nn.Sequential:
    """Three convolutions with norms, for images of 32 x 32."""
    blocks: list[nn.Module] = []
    for before, width in ((3, 32), (32, 64), (64, 128)):
        blocks += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def training(
    optimizer_class: type[LARS | LAMB], compiles_network: bool, compiles_step: bool
) -> Callable[[Tensor, Tensor], tuple[float, float]]:
    """Return a function that trains on a batch and returns the milliseconds in total and in the optimizer."""
    torch.manual_seed(0)
    net = network()
    optimizer = build_optimizer(net, optimizer_class, lr=torch.tensor(1e-3))
    forward = torch.compile(net, fullgraph=True) if compiles_network else net
    step = torch.compile(optimizer.step, fullgraph=True) if compiles_step else optimizer.step

    def train(x: Tensor, y: Tensor) -> tuple[float, float]:
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(forward(x), y).backward()
        middle = time.perf_counter()
        step()
        end = time.perf_counter()
        return 1e3 * (end - start), 1e3 * (end - middle)

    return train


def main() -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="Batches per variant.")
    parser.add_argument("--batch-size", type=int, default=64, help="Images per batch.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x, y = torch.randn(arguments.batch_size, 3, 32, 32), torch.randint(10, (arguments.batch_size,))
    table = Table("Optimizer", "Compiled", "Iteration, ms", "x eager", "Step, ms", "x eager")
    for optimizer_class in (LARS, LAMB):
        build = partial(training, optimizer_class)
        ways = {
            "nothing": build(False, False),
            "network": build(True, False),
            "step": build(False, True),
            "both": build(True, True),
        }
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for train in ways.values():
            for _ in range(3):
                train(x, y)
        for _ in track(range(arguments.rounds), description=optimizer_class.__name__, transient=True):
            for way, train in ways.items():
                times[way].append(train(x, y))
        medians = {
            way: [statistics.median(each) for each in zip(*of_way, strict=True)]
            for way, of_way in times.items()
        }
        eager = medians["nothing"]
        for way, (batch, step) in medians.items():
            ratios = f"{batch / eager[0]:.2f}", f"{step / eager[1]:.2f}"
            table.add_row(optimizer_class.__name__, way, f"{batch:.1f}", ratios[0], f"{step:.2f}", ratios[1])
    Console().print(table)


if __name__ == "__main__":
    main()
