"""Timing of steps on a GPU, eager or replayed from a CUDA graph; on a CPU only as a dry run."""

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]


def steps(step: Step, count: int) -> None:
    """Take some steps."""
    for _ in range(count):
        step()


def median_time(step: Step, count: int, turns: int) -> tuple[float, float]:
    """Return the median milliseconds per step, and the spread over turns, by the device's clock.

    Args:
        step: The function to time.
        count: Steps per turn, because a single one is too short for the clock.
        turns: Number of turns.
    """
    times = []
    for _ in range(turns):
        if not torch.cuda.is_available():
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        steps(step, count)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / count)
    return round(statistics.median(times), 5), round(max(times) - min(times), 5)


def host_time(step: Step, turns: int) -> float:
    """Return the median microseconds that a step keeps the host busy."""
    times = []
    for _ in range(turns):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(1e6 * (time.perf_counter() - start))
    return round(statistics.median(times), 1)


def capture(step: Step, before: Step | None = None) -> Step:
    """Take three steps, and return the replay of a captured fourth one; without a GPU the step itself.

    Args:
        step: The function to capture.
        before: Called between the warmup steps and the capture.
    """
    if not torch.cuda.is_available():
        steps(step, 3)
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        steps(step, 3)
    torch.cuda.current_stream().wait_stream(side)
    if before is not None:
        before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Step = graph.replay
    return replay


def kernels(step: Step) -> dict[str, tuple[int, float]]:
    """Return the number of launches of each kernel in a step, and their total microseconds."""
    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return {
        event.key[:60]: (event.count, round(event.self_device_time_total, 2))
        for event in profiler.key_averages()
        if event.self_device_time_total
    }


def clear(device: str) -> None:
    """Release unused memory to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
