"""What could be gained by hiding the exchange of norms behind work that needs no norm.

    python -m benchmarks.exchange

Processes with gloo hold the FSDP2 shards of a model. A step measures the layers, waits for one all-reduce of
their norms, and moves the layers. Excluded parameters need no norm: their part of the step could run while
the others wait. It is measured as the step of an optimizer of these parameters alone. The gain is at most the
shorter of the two.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.model_shapes import grouped
from benchmarks.sharded_models import MODELS, fsdp2, sharded
from lightning_lars import LAMB, LARS

ALGORITHMS = {"LARS": LARS, "LAMB": LAMB}


class Times(NamedTuple):
    """Medians over the steps of a rank, in milliseconds."""

    step: float
    waiting: float
    """In the all-reduce of a step: for the ranks that are behind, and for the exchange."""

    exchange: float
    """An all-reduce of as many bytes, when all ranks are there."""

    excluded: float
    """The step of the excluded parameters."""


class TimedAllReduce:
    """Takes the place of ``torch.distributed.all_reduce``, and adds up how long it takes."""

    def __init__(self) -> None:
        self.milliseconds, self.bytes = 0.0, 0
        self._all_reduce = dist.all_reduce

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.bytes = tensor.nbytes
        start = time.perf_counter()
        result = self._all_reduce(tensor, *args, **kwargs)
        self.milliseconds += 1e3 * (time.perf_counter() - start)
        return result


def timed(function: Callable[[], object], rounds: int) -> list[float]:
    """Return the milliseconds of each call; all ranks begin each at the same time."""
    times = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def measure(model: str, algorithm: Callable[..., Optimizer], rounds: int) -> Times:
    """Return the times of a rank."""
    groups = grouped(list(sharded(MODELS[model](), fsdp2(dist.get_world_size()), "cpu").parameters()))
    whole, excluded = algorithm(groups, lr=1e-3), algorithm(groups[1:], lr=1e-3)
    waits = []

    def step() -> None:
        with mock.patch.object(dist, "all_reduce", TimedAllReduce()) as all_reduce:
            whole.step()
        waits.append((all_reduce.milliseconds, all_reduce.bytes))

    for function in (step, excluded.step):
        timed(function, 3)
    waits.clear()
    steps, parts = timed(step, rounds), timed(excluded.step, rounds)
    message = torch.zeros(waits[-1][1] // 8, dtype=torch.float64)
    exchanges = timed(partial(dist.all_reduce, message), rounds)
    return Times(*map(statistics.median, (steps, [each for each, _ in waits], exchanges, parts)))


def rank(number: int, ranks: int, model: str, rounds: int, folder: str) -> None:
    """Be one of the processes, and save its times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=ranks)
    times = {name: tuple(measure(model, each, rounds)) for name, each in ALGORITHMS.items()}
    torch.save(times, Path(folder) / f"{number}.pt")
    dist.destroy_process_group()


def main() -> None:
    """Read the command line, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["ResNet-50", "GPT 0.1 B"])
    parser.add_argument("--ranks", type=int, default=4, help="Processes.")
    parser.add_argument("--rounds", type=int, default=31, help="Steps of each measurement.")
    arguments = parser.parse_args()
    columns = ("Step, ms", "Waiting", "Exchange alone", "Excluded parameters", "Gain at most")
    table = Table("Model", "Optimizer", *columns, title=f"{arguments.ranks} ranks, FSDP2, gloo")
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            options = (arguments.ranks, model, arguments.rounds, folder)
            torch.multiprocessing.spawn(rank, options, nprocs=arguments.ranks)
            saved = [torch.load(Path(folder) / f"{number}.pt") for number in range(arguments.ranks)]
        for name in ALGORITHMS:
            times = Times(*map(statistics.mean, zip(*(each[name] for each in saved), strict=True)))
            gain = min(times.waiting, times.excluded) / times.step
            table.add_row(model, name, *(f"{each:.2f}" for each in times), f"{gain:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
