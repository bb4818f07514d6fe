"""What it gains that the exchange of norms runs while the layers that need no norm are updated.

    python -m benchmarks.exchange

Processes with gloo hold the FSDP2 shards of a model. A step measures the adapted layers, starts one
all-reduce of their norms, updates the excluded parameters, waits, and updates the adapted layers. It takes
turns with a step that waits at once.
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

    at_once: float
    """A step that waits for the all-reduce as soon as it has begun."""

    hidden: float
    """A step that updates the excluded parameters first."""

    waiting_at_once: float
    """In the all-reduce: for the ranks that are behind, and for the exchange."""

    waiting_hidden: float

    exchange: float
    """An all-reduce of as many bytes by itself, when all ranks have arrived."""

    excluded: float
    """The step of an optimizer of the excluded parameters."""


class AllReduce:
    """Takes the place of ``torch.distributed.all_reduce``, and adds up how long the step waits for it."""

    def __init__(self, *, waits_at_once: bool) -> None:
        self.milliseconds, self.bytes = 0.0, 0
        self._waits_at_once = waits_at_once
        self._all_reduce = dist.all_reduce

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.bytes = tensor.nbytes
        self._work = self._all_reduce(tensor, *args, **kwargs)
        if self._waits_at_once and self._work is not None:
            self.wait()
            self._work = None
        return self

    def wait(self) -> None:
        if self._work is not None:
            self.milliseconds += timed(self._work.wait)


def timed(function: Callable[[], object]) -> float:
    """Return the milliseconds of a call."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def together(function: Callable[[], object]) -> float:
    """Return the milliseconds of a call that all ranks begin at the same time."""
    dist.barrier()
    return timed(function)


def measure(model: str, algorithm: Callable[..., Optimizer], rounds: int) -> Times:
    """Return the times of a rank."""
    groups = grouped(list(sharded(MODELS[model](), fsdp2(dist.get_world_size()), "cpu").parameters()))
    optimizer, excluded = algorithm(groups, lr=1e-3), algorithm(groups[1:], lr=1e-3)
    for _ in range(3):
        optimizer.step()
        excluded.step()
    steps: dict[bool, list[float]] = {True: [], False: []}
    waits: dict[bool, list[float]] = {True: [], False: []}
    parts, exchanges = [], []
    for number in range(rounds):
        for waits_at_once in (True, False) if number % 2 else (False, True):
            all_reduce = AllReduce(waits_at_once=waits_at_once)
            with mock.patch.object(dist, "all_reduce", all_reduce):
                steps[waits_at_once].append(together(optimizer.step))
            waits[waits_at_once].append(all_reduce.milliseconds)
        parts.append(together(excluded.step))
        message = torch.zeros(all_reduce.bytes // 8, dtype=torch.float64)
        exchanges.append(together(partial(dist.all_reduce, message)))
    samples = (steps[True], steps[False], waits[True], waits[False], exchanges, parts)
    return Times(*map(statistics.median, samples))


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
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="Processes.")
    parser.add_argument("--rounds", type=int, default=31, help="Steps of each kind.")
    arguments = parser.parse_args()
    columns = ("Step, ms", "hidden", "x", "Waiting, ms", "hidden", "Exchange alone", "Excluded alone")
    table = Table("Model", "Ranks", "Optimizer", *columns)
    for model in arguments.models:
        for ranks in arguments.ranks:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(rank, (ranks, model, arguments.rounds, folder), nprocs=ranks)
                saved = [torch.load(Path(folder) / f"{number}.pt") for number in range(ranks)]
            for name in ALGORITHMS:
                times = Times(*map(statistics.mean, zip(*(each[name] for each in saved), strict=True)))
                steps = (f"{times.at_once:.1f}", f"{times.hidden:.1f}", f"{times.hidden / times.at_once:.3f}")
                table.add_row(model, str(ranks), name, *steps, *(f"{each:.1f}" for each in times[2:]))
    Console().print(table)


if __name__ == "__main__":
    main()
