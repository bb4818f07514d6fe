"""Check and time the kernels in Triton on a GPU: one command of less than eight minutes.

    python -m benchmarks.on_gpu --out results.jsonl         # from the root of a checkout, installed or not
    python -m benchmarks.on_gpu --only canary times --out results.jsonl
    python -m benchmarks.on_gpu --report results.jsonl      # the tables of docs/performance.md
    python -m benchmarks.on_gpu --dry --out results.jsonl   # on a CPU, tiny, only to see that it runs

Every phase is a process with a limit of its own, and a fact is written as a line of JSON as soon as it is
known: a crash, an illegal address or a limit in one phase costs no other, and what has been written stays.
The most valuable come first.

It needs torch with CUDA and triton, and takes timm, torchao, pytest with pytest-xdist and compute-sanitizer
where they are there.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.gpu_report import read, report

LIMITS = {"canary": 60, "times": 150, "waits": 60, "tests": 140, "sweep": 60, "memcheck": 60, "compiled": 90}
"""Seconds that a phase may take."""

WITHOUT_GPU = 3
_SHORTEST = 10

Say = Callable[..., None]


def say_to(path: Path, phase: str) -> Say:
    """Return what prints a fact of a phase, and adds it to a file."""

    def say(**facts: object) -> None:
        line = json.dumps({"phase": phase, **facts})
        print(line, flush=True)
        with path.open("a") as file:
            file.write(f"{line}\n")

    return say


def take(phase: str, path: Path, dry: bool) -> None:
    """Go through a phase: what its process does."""
    os.setsid()  # so that a limit ends what it has started, too
    from benchmarks import gpu_phases

    say = say_to(path, phase)
    if not dry and not gpu_phases.has_gpu():
        sys.exit(WITHOUT_GPU)
    try:
        gpu_phases.PHASES[phase](say, dry)
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}"[:500])
        raise


def watch(phase: str, process: BaseProcess, limit: float, say: Say) -> int | None:
    """Wait for a phase until its limit, and say how it ended."""
    start = time.monotonic()
    process.start()
    process.join(limit)
    if process.exitcode is None and process.pid is not None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    seconds = round(time.monotonic() - start, 1)
    say(code=process.exitcode, seconds=seconds, **({"limit": limit} if seconds >= limit else {}))
    return process.exitcode


def main() -> int:
    """Read the command line, and go through one phase after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="Which phases.")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"), help="Where to add the facts.")
    parser.add_argument("--seconds", type=float, default=470, help="Of all phases together.")
    parser.add_argument("--dry", action="store_true", help="On the CPU, in Triton's interpreter.")
    parser.add_argument("--report", type=Path, metavar="FILE", help="Only print the tables of these facts.")
    arguments = parser.parse_args()
    if arguments.report:
        print(report(read(arguments.report)))
        return 0
    end = time.monotonic() + arguments.seconds
    if arguments.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        # Once for all phases: without a GPU, a process may be a copy of this one.
        from benchmarks import gpu_phases  # noqa: F401
    context = multiprocessing.get_context("fork" if arguments.dry else "spawn")
    codes = []
    for phase in arguments.only:
        say = say_to(arguments.out, phase)
        limit = min(LIMITS[phase], end - time.monotonic())
        if limit < _SHORTEST:
            say(skipped="no time is left")
            continue
        process = context.Process(target=take, args=(phase, arguments.out, arguments.dry))
        codes.append(watch(phase, process, limit, say))
        if codes[-1] == WITHOUT_GPU:
            parser.error("there is no GPU: --dry goes through all phases in Triton's interpreter")
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
