"""Check and time the kernels in Triton on a GPU, in one command of a few minutes.

    python -m benchmarks.on_gpu

1. The tests of the kernels: against single operations and against float64, for every option and dtype.
2. That a step never waits for the device, and that a CUDA graph of it takes the steps that it takes.
3. Times of a step, alone and replayed from a CUDA graph, beside torch's fused SGD and AdamW, timm's, compiled
   steps, and kernels that take the layers in groups that the L2 cache holds between their two passes.

``--report FILE`` prints the tables of results that are already there.
It needs torch with CUDA, triton, pytest, hypothesis and numpy. ``--device cpu --only times`` runs the last
part without a GPU, in Triton's interpreter, to see that it runs.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.gpu_report import read, report
from benchmarks.model_shapes import SHAPES, elements, grouped, parameters
from benchmarks.rivals import find
from benchmarks.timing import in_turns, memory_bandwidth
from lightning_lars import LAMB, LARS
from lightning_lars.optim import layers
from lightning_lars.optim.kernels import choice

PARTS = ("tests", "waits", "times")
AIMS = {"LARS": ("resnet50", 1.25), "LAMB": ("bert-large", 1.15)}
WAITING = (
    (LARS, {}),
    (LARS, {"nesterov": True, "weight_decay": 0.1, "max_grad_norm": 1.0, "trust_clip": "larc"}),
    (LARS, {"denominator": "momentum", "weight_decay": 0.1}),
    (LAMB, {}),
    (LAMB, {"max_grad_norm": 1.0, "trust_clip": (0.1, 10.0), "max_weight_norm": 10.0}),
)
# Groups of so many elements, with w, g and v of float32 in at most half of 50 MB.
GROUP = 2**21


def check(console: Console) -> bool:
    """Run the tests of the kernels, which compile here and do not take the interpreter."""
    tests = ["tests/optim/test_fused.py", "tests/optim/test_parity.py", "tests/optim/test_triton.py"]
    options = ["-q", "-k", "triton or compiles", "-p", "no:cacheprovider", "-W", "default"]
    code = pytest.main([*options, *tests])
    console.print(f"Tests of the kernels: {'passed' if code == 0 else f'ended with {code!r}'}.")
    return code == 0


def check_waits(console: Console) -> bool:
    """Step with a GPU that raises where the host waits for it, and replay a captured step."""
    holds = True
    for optimizer_class, options in WAITING:
        label = f"{optimizer_class.__name__} {options}"
        try:
            _never_wait(optimizer_class, options)
            difference = _replay(optimizer_class, options)
        except Exception as error:
            console.print(f"{label}: {error!r}")
            holds = False
        else:
            console.print(f"{label}: no wait; a CUDA graph's steps are off by {difference:.1e} at most")
            holds &= difference < 1e-6
    return holds


def _never_wait(optimizer_class: type[LARS | LAMB], options: dict[str, object]) -> None:
    params = parameters(SHAPES["small-cnn"](), "cuda")
    optimizer = optimizer_class(grouped(params), fused=True, lr=torch.tensor(0.1, device="cuda"), **options)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
            optimizer.trust_ratios()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _replay(optimizer_class: type[LARS | LAMB], options: dict[str, object]) -> float:
    ends = []
    for captures in (True, False):
        params = parameters(SHAPES["small-cnn"](), "cuda")
        optimizer = optimizer_class(
            grouped(params), fused=True, lr=torch.tensor(0.1, device="cuda"), **options
        )
        step = capture(optimizer) if captures else optimizer.step
        if not captures:
            for _ in range(3):
                optimizer.step()
        for number in range(3):
            generator = torch.Generator("cuda").manual_seed(number)
            for p in params:
                p.grad.normal_(generator=generator)
            for group in optimizer.param_groups:
                group["lr"].fill_(0.1 / (1 + number))
            step()
        ends.append([p.detach().clone() for p in params])
    return max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))


def capture(optimizer: Optimizer) -> Callable[[], None]:
    """Take three steps, and return the replay of a captured one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    replay: Callable[[], None] = graph.replay
    # A capture runs nothing, so that a replay is the fourth step.
    return replay


@contextmanager
def in_groups(size: float) -> Iterator[None]:
    """Let the kernels take layers of so many elements at once."""
    with patch.object(layers, "_elements_at_once", lambda part, group: size):
        yield


def grouped_step(optimizer: Optimizer) -> Callable[[], None]:
    """Return a step in groups of layers."""

    def step() -> None:
        with in_groups(GROUP):
            optimizer.step()

    return step


def time_model(name: str, rounds: int, device: str, dtype: torch.dtype, console: Console) -> None:
    """Print the times of all steps on the layers of a model."""
    shapes = SHAPES[name]()

    def new() -> list[Parameter]:
        return parameters(shapes, device, dtype)

    lr = torch.tensor(1e-3, device=device)
    lars = {"momentum": 0.9, "weight_decay": 1e-4}
    lamb = {"weight_decay": 0.01}
    on_gpu = device == "cuda"
    floors = {
        "LARS": SGD(new(), lr=1e-3, fused=True, **lars),
        "LAMB": AdamW(new(), lr=lr if on_gpu else 1e-3, fused=True, capturable=on_gpu, **lamb),
    }
    ours = {"LARS": (LARS, lars), "LAMB": (LAMB, lamb)}
    steps: dict[str, tuple[str, Callable[[], object]]] = {}
    for family, (optimizer_class, options) in ours.items():
        floor = floors[family]

        def build(fused: bool | None = True) -> Optimizer:
            return optimizer_class(grouped(new()), lr=lr.clone(), fused=fused, **options)  # noqa: B023

        floor_name = f"{type(floor).__name__}(fused=True)"
        steps[floor_name] = family, floor.step
        steps[f"{family}(fused=True)"] = family, build().step
        steps[f"{family}(fused=True), in groups"] = family, grouped_step(build())
        steps[f"{family}(fused=False)"] = family, build(False).step
        if published := find(f"timm {family.capitalize()}, foreach"):
            steps[f"timm {family.capitalize()}, foreach"] = family, published(new()).step
        if on_gpu:
            compiled = torch.compile(build(False).step, fullgraph=True)
            steps[f"{family}(fused=False), compiled"] = family, compiled
            steps[f"{floor_name}, graph"] = family, capture(floor)
            steps[f"{family}(fused=True), graph"] = family, capture(build())
            with in_groups(GROUP):
                steps[f"{family}(fused=True), in groups, graph"] = family, capture(build())
    times = in_turns({label: step for label, (_, step) in steps.items()}, rounds, device, name)
    medians = {label: statistics.median(of_step) for label, of_step in times.items()}
    bandwidth = memory_bandwidth(device)
    size = elements(shapes)
    table = Table(title=f"{name}, {dtype}: {len(shapes)} tensors, {size / 1e6:.1f} M parameters")
    for column in ("Step", "Median ms", "Of fused floor", "Bandwidth at 20 or 28 bytes"):
        table.add_column(column, justify="left" if column == "Step" else "right")
    for label, (family, _) in steps.items():
        floor_name = f"{type(floors[family]).__name__}(fused=True)" + (", graph" if "graph" in label else "")
        moved = {"LARS": 20, "LAMB": 28}[family] * size if dtype is torch.float32 else 0
        share = f"{moved / medians[label] / bandwidth:.0%}" if moved else ""
        table.add_row(label, f"{medians[label]:.3f}", f"{medians[label] / medians[floor_name]:.2f}", share)
    console.print(table)
    for family, (model, aim) in AIMS.items():
        if model == name and on_gpu and dtype is torch.float32:
            floor_name = f"{type(floors[family]).__name__}(fused=True), graph"
            reached = medians[f"{family}(fused=True), graph"] / medians[floor_name]
            console.print(f"{family} on {name}: {reached:.2f} of the fused floor, the aim is {aim}")
    console.print(f"A copy moves {bandwidth / 1e6:.0f} GB/s.")


def main() -> int:
    """Read the command line, and do one part after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="Which parts.")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["resnet50", "bert-large"])
    parser.add_argument("--rounds", type=int, default=20, help="Turns of each step.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--report", type=Path, metavar="FILE", help="Only print the tables of these results.")
    arguments = parser.parse_args()
    if arguments.report:
        print(report(read(arguments.report)))
        return 0
    console = Console()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu --only times runs the last part in Triton's interpreter")
    if arguments.device == "cpu":
        if list(arguments.only) != ["times"]:
            parser.error("without a GPU only the times can be taken: --only times")
        os.environ["TRITON_INTERPRET"] = "1"
        choice.TRITON_DEVICES.add("cpu")
    else:
        console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    holds = True
    if "tests" in arguments.only:
        holds &= check(console)
    if "waits" in arguments.only:
        holds &= check_waits(console)
    if "times" in arguments.only:
        dtypes = [torch.float32, torch.bfloat16] if arguments.device == "cuda" else [torch.float32]
        for name in arguments.shapes:
            for dtype in dtypes:
                time_model(name, arguments.rounds, arguments.device, dtype, console)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
