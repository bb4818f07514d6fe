"""The time of the host in a step on a GPU, measured without one.

    python -m benchmarks.host_time

Kernels are compiled for compute capability 9.0, and a launch of them does nothing, so that what remains of a
step over small layers is its Python. A launch on a GPU takes a few microseconds more.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer
from triton.backends.compiler import GPUTarget

from benchmarks.model_shapes import grouped
from lightning_lars import LAMB, LARS
from lightning_lars.optim.backends import choice


class Nowhere:
    """A driver of a GPU that is not there: it compiles kernels, and records their launches."""

    def __init__(self, capability: int = 90) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.launches: list[tuple[str, tuple[Any, ...]]] = []
        """The name and the arguments of each."""

        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**17, "multiprocessor_count": 132},
            load_binary=lambda *_: (object(), 1, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return what launches a kernel, as Triton expects it."""
        return lambda *args: self.launches.append((metadata.name, args[9:]))

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Return the number of the device."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """Return the handle of the stream."""
        return 0

    @classmethod
    def install(cls) -> "Nowhere":
        """Make it Triton's driver in this process, for tensors on the CPU."""
        driver = cls()
        triton.runtime.driver.set_active(driver)
        choice.TRITON_DEVICES.add("cpu")
        return driver


def layers(count: int) -> list[Parameter]:
    """Return layers of eight elements, a third of them matrices as in a ResNet."""
    return [Parameter(torch.randn(2, 4) if i % 3 == 0 else torch.randn(8)) for i in range(count)]


def host_time(optimizer: Optimizer, params: Sequence[Tensor], moves: bool, rounds: int) -> float:
    """Return the median microseconds of a step.

    Args:
        optimizer: Of these parameters.
        params: All of them.
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
    driver = Nowhere.install()
    table = Table(
        "Layers",
        "Optimizer",
        "Launches",
        "us",
        "us, gradients move",
        "us, fused by torch (with its arithmetic)",
    )
    for count in arguments.layers:
        for ours, theirs in ((LARS, SGD), (LAMB, AdamW)):
            params, others = layers(count), layers(count)
            optimizer = ours(grouped(params), fused=True)
            times = [host_time(optimizer, params, moves, arguments.rounds) for moves in (False, True)]
            driver.launches.clear()
            optimizer.step()
            floor = host_time(theirs(others, fused=True), others, False, arguments.rounds)
            columns = (len(driver.launches), *(f"{value:,.0f}" for value in (*times, floor)))
            table.add_row(f"{count:,}", ours.__name__, *map(str, columns))
    Console().print(table)


if __name__ == "__main__":
    main()
