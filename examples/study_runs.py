"""Trains the runs of the large-batch study in parallel processes, and stores the outcomes in a CSV file."""

import csv
import dataclasses
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from study_training import Choice, Data, Outcome, Run, be_quiet, load, train

EXAMPLE = Run("cnn", Choice("SGD", 0.1, weight_decay=5e-4), 128, seed=0)  # for the names of the columns


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings shared by all runs of a study."""

    epochs: int
    data_dir: Path | None
    train_images: int
    validation_images: int
    accelerator: str = "cpu"


class RunCache:
    """Trains runs, in no particular order, unless the CSV file already contains them.

    An interrupted study resumes where it stopped, and the parts of a study share their runs.

    Args:
        settings: Settings shared by all runs, written to every line of the file.
        path: The CSV file.
        processes: Number of parallel processes, each with one thread.
    """

    def __init__(self, settings: Settings, path: Path, processes: int) -> None:
        self._settings = settings
        self._path = path
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        self._known: dict[tuple[str, ...], Outcome] = {}
        self._asked: set[tuple[str, ...]] = set()
        if path.exists():
            with path.open(newline="") as file:
                lines = csv.DictReader(file)
                columns = [field.name for field in dataclasses.fields(Outcome)]
                if lines.fieldnames != [*self._line(EXAMPLE), *columns]:
                    raise SystemExit(f"{path} has the columns of another study; choose another --folder")
                for line in lines:
                    key = tuple(line[column] for column in self._line(EXAMPLE))
                    self._known[key] = _outcome(line)

    @property
    def cpu_seconds(self) -> float:
        """Total of the requested runs, including those from the file, without data loading and imports."""
        return sum(self._known[key].cpu_seconds for key in self._asked)

    @property
    def number(self) -> int:
        """Number of requested runs."""
        return len(self._asked)

    def __call__(self, runs: Iterable[Run], description: str) -> dict[Run, Outcome]:
        """Return the outcome of every run."""
        runs = list(dict.fromkeys(runs))
        missing = [run for run in runs if self._key(run) not in self._known]
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[last]}"),
        )
        with Progress(*columns) as progress:
            task = progress.add_task(
                description, total=len(runs), completed=len(runs) - len(missing), last=""
            )
            for run, outcome in self._train(missing):
                self._keep(run, outcome)
                progress.update(task, advance=1, last=f"{describe(run)}: {outcome.validation:.1f} %")
        self._asked.update(map(self._key, runs))
        return {run: self._known[self._key(run)] for run in runs}

    def _train(self, runs: list[Run]) -> Iterable[tuple[Run, Outcome]]:
        if self._processes == 1:
            _start(self._settings)
            yield from ((run, _train(run)) for run in runs)
            return
        if self._pool is None and runs:
            # Spawned, because torch's threads do not survive a fork.
            self._pool = ProcessPoolExecutor(
                self._processes, get_context("spawn"), initializer=_start, initargs=(self._settings,)
            )
        futures: dict[Future[Outcome], Run] = {self._pool.submit(_train, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def _keep(self, run: Run, outcome: Outcome) -> None:
        self._known[self._key(run)] = outcome
        line = {**self._line(run), **dataclasses.asdict(outcome)}
        is_new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(line))
            if is_new:
                writer.writeheader()
            writer.writerow(line)

    def _line(self, run: Run) -> dict[str, Any]:
        return {
            "data": "digits" if self._settings.data_dir is None else "fashion-mnist",
            "epochs": self._settings.epochs,
            "train_images": self._settings.train_images,
            "validation_images": self._settings.validation_images,
            "accelerator": self._settings.accelerator,
            "model": run.model,
            **{f"base_{key}": value for key, value in dataclasses.asdict(run.choice).items()},
            "batch_size": run.batch_size,
            "rule": run.rule,
            "scales_weight_decay": run.scales_weight_decay,
            "seed": run.seed,
        }

    def _key(self, run: Run) -> tuple[str, ...]:
        return tuple("" if value is None else str(value) for value in self._line(run).values())


def describe(run: Run) -> str:
    """Return a short description of a run for the progress bar."""
    return f"{run.model}, {run.choice.optimizer} {run.choice.lr:.3g} at {run.batch_size}"


def _outcome(line: dict[str, str]) -> Outcome:
    found = {field.name: float(line[field.name]) for field in dataclasses.fields(Outcome)}
    return Outcome(**{**found, "steps": int(line["steps"])})


_shared: tuple[Settings, Data] | None = None  # per process


def _start(settings: Settings) -> None:
    global _shared
    torch.set_num_threads(1)
    be_quiet()
    if _shared is None or _shared[0] != settings:
        images = load(settings.data_dir, settings.train_images, settings.validation_images)
        _shared = (settings, images)


def _train(run: Run) -> Outcome:
    assert _shared is not None
    settings, images = _shared
    return train(run, settings.epochs, images, settings.accelerator)
