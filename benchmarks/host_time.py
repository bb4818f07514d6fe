"""The time of the host in a step on a GPU, measured without one.

    python -m benchmarks.host_time

Kernels are compiled for compute capability 9.0 but not run: what remains of a step over small layers is its
Python. A launch on a GPU takes a few microseconds more.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.absent_gpu import AbsentGPU
from benchmarks.model_shapes import grouped
from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit

OPTIONS = {optimizer: {"min_8bit_size": 256} for optimizer in (LARS8bit, LAMB8bit)}


def layers(count: int) -> list[Parameter]:
    """Return small layers, a third of them matrices as in a ResNet, large enough for 8-bit state."""
    return [Parameter(torch.randn(16, 16) if i % 3 == 0 else torch.randn(8)) for i in range(count)]


def host_time(optimizer: Optimizer, params: Sequence[Tensor], moves: bool, rounds: int) -> float:
    """Return the median microseconds of a step.

    Args:
        optimizer: The optimizer of these parameters.
        params: All parameters.
        moves: Whether each step finds its gradients at other addresses.
        rounds: Number of steps.
    """
    gradients = [[torch.randn_like(p) for p in params] for _ in range(2)]
    times = []
    for number in range(rounds + 3):
        if moves or number == 0:
            for p, gradient in zip(params, gradients[number % 2], strict=True):
                p.grad = gradient
        start = time.thread_time_ns()
        optimizer.step()
        times.append((time.thread_time_ns() - start) / 1e3)
    return statistics.median(times[3:])


def main() -> None:
    """Read the command line, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[11, 161, 1000], help="Layers.")
    parser.add_argument("--rounds", type=int, default=101, help="Steps of each measurement.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    driver = AbsentGPU.install()
    table = Table(
        "Layers",
        "Optimizer",
        "Launches",
        "us",
        "us, gradients move",
        "us, fused by torch (with its arithmetic)",
    )
    for count in arguments.layers:
        for ours, theirs in ((LARS, SGD), (LAMB, AdamW), (LARS8bit, SGD), (LAMB8bit, AdamW)):
            params, others = layers(count), layers(count)
            optimizer = ours(grouped(params), fused=True, **OPTIONS.get(ours, {}))
            times = [host_time(optimizer, params, moves, arguments.rounds) for moves in (False, True)]
            driver.launches.clear()
            optimizer.step()
            floor = host_time(theirs(others, fused=True), others, False, arguments.rounds)
            columns = (len(driver.launches), *(f"{value:,.0f}" for value in (*times, floor)))
            table.add_row(f"{count:,}", ours.__name__, *map(str, columns))
    Console().print(table)


if __name__ == "__main__":
    main()
