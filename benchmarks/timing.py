"""Timing of optimizer steps, in interleaved rounds."""

import time
from collections.abc import Callable, Iterable, Mapping

import torch
from rich.progress import track

# Steps per measurement on a GPU, because a single one is too short for its clock.
_STEPS_ON_GPU = 10


def in_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: str, description: str
) -> dict[str, list[float]]:
    """Call each function once to warm up, then all of them in interleaved rounds.

    Args:
        steps: The functions to time, by name.
        rounds: Number of rounds.
        device: Their device: a GPU is timed by its own clock.
        description: Text of the progress bar.

    Returns:
        Milliseconds of each call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3 if device == "cuda" else 1):
            step()
    rounds_with_bar: Iterable[int] = track(range(rounds), description=description, transient=True)
    for _ in rounds_with_bar:
        for name, step in steps.items():
            times[name].append(_on_gpu(step) if device == "cuda" else _on_cpu(step))
    return times


def memory_bandwidth(device: str, rounds: int = 10) -> float:
    """Return the memory bandwidth in bytes per millisecond, measured with 256 MiB.

    Measured by a copy on a GPU, and by an in-place multiplication on the CPU, where a copy is slower than a
    step because it reads the memory that it is about to overwrite.
    """
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    passes = {"cuda": lambda: target.copy_(source), "cpu": lambda: source.mul_(1.0)}
    times = in_turns({"pass": passes[device]}, rounds, device, "bandwidth")["pass"]
    return 2 * source.numel() * source.element_size() / sorted(times)[len(times) // 2]


def _on_cpu(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def _on_gpu(step: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(_STEPS_ON_GPU):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / _STEPS_ON_GPU
