"""Check and time the Triton kernels on a GPU, in one command of less than eight minutes.

    python -m benchmarks.on_gpu --out results.jsonl         # from the root of a checkout, installed or not
    python -m benchmarks.on_gpu --only canary times --out results.jsonl
    python -m benchmarks.on_gpu --report results.jsonl      # the tables of docs/performance.md
    python -m benchmarks.on_gpu --dry --out results.jsonl   # on a CPU, tiny, only to see that it runs

Every phase is a separate process with its own time limit, and results are written as JSON lines as soon as
they are known: a crash, an illegal address or a timeout in one phase affects no other, and earlier results
are kept. The most valuable phases come first.

Needs torch with CUDA and triton, and uses timm, torchao, pytest with pytest-xdist and compute-sanitizer where
available.
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

LIMITS = {"canary": 60, "times": 180, "waits": 60, "tests": 140, "sweep": 60, "memcheck": 60, "compiled": 90}
"""Time limit of each phase in seconds."""

WITHOUT_GPU = 3
_SHORTEST = 10

Say = Callable[..., None]


def say_to(path: Path, phase: str) -> Say:
    """Return a function that prints a result of a phase, and appends it to a file."""

    def say(**facts: object) -> None:
        line = json.dumps({"phase": phase, **facts})
        print(line, flush=True)
        with path.open("a") as file:
            file.write(f"{line}\n")

    return say


def take(phase: str, path: Path, dry: bool) -> None:
    """Run a phase, in its own process."""
    os.setsid()  # so that a timeout also ends its child processes
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
    """Wait for a phase until its time limit, and record how it ended."""
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
    """Read the command line, and run one phase after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="Phases to run."
    )
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"), help="File to append results to.")
    parser.add_argument("--seconds", type=float, default=470, help="Time limit for all phases together.")
    parser.add_argument("--dry", action="store_true", help="On the CPU, in Triton's interpreter.")
    parser.add_argument("--report", type=Path, metavar="FILE", help="Only print the tables of these results.")
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
            say(skipped="no time left")
            continue
        process = context.Process(target=take, args=(phase, arguments.out, arguments.dry))
        codes.append(watch(phase, process, limit, say))
        if codes[-1] == WITHOUT_GPU:
            parser.error("there is no GPU: --dry goes through all phases in Triton's interpreter")
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
