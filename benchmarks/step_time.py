"""Time of an optimizer step on the CPU, beside torch's fused optimizers and published LARS and LAMB.

    python -m benchmarks.step_time                          # ResNet-50's layers, one thread
    python -m benchmarks.step_time --shapes bert-base tiny --threads 2

All optimizers take turns within one run, each with parameters of its own; what counts are the ratios of the
medians. Peers are installed into ``.peers/`` on first use, as by the tests.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from lightning_lars import LAMB, LARS
from tests.peers import peer

Shape = tuple[int, ...]


def small_cnn() -> list[Shape]:
    """The convolutions and batch norms of a network for small images."""
    widths = [1, 32, 64, 128]
    shapes: list[Shape] = []
    for before, width in pairwise(widths):
        shapes += [(width, before, 3, 3), (width,), (width,)]
    return [*shapes, (10, 1152), (10,)]


def resnet50() -> list[Shape]:
    """He et al. 2016: 161 tensors, 25.6 million parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for conv in ((width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [conv, (conv[0],), (conv[0],)]
            if block == 0:
                shapes += [(4 * width, before, 1, 1), (4 * width,), (4 * width,)]
            before = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def transformer(width: int, layers: int, embeddings: list[Shape]) -> list[Shape]:
    """Blocks of attention and a perceptron of four times the width."""
    block = [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*embeddings, *(block + 4 * [(width,)]) * layers]


SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "small-cnn": small_cnn,
    "resnet50": resnet50,
    "vit-b": partial(transformer, 768, 12, [(768, 3, 16, 16), (1, 197, 768), (1000, 768)]),
    "bert-base": partial(transformer, 768, 12, [(30522, 768), (512, 768), (2, 768)]),
    "tiny": lambda: [(10, 50)] * 10_000,
}


def parameters(shapes: list[Shape]) -> list[Parameter]:
    """Parameters with gradients."""
    torch.manual_seed(0)
    params = [Parameter(0.05 * torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = 0.01 * torch.randn_like(p)
    return params


def grouped(params: list[Parameter]) -> list[dict[str, object]]:
    """Weights, and norms and biases apart."""
    groups = [
        {"params": [p for p in params if p.ndim > 1]},
        {"params": [p for p in params if p.ndim <= 1], "layer_adaptation": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# What the table calls it, requirement and module, class.
LARS_PEERS = (
    ("timm Lars", ("timm==1.0.31", "timm.optim.lars"), "Lars"),
    ("torch_optimizer LARS", ("torch_optimizer==0.3.0", "torch_optimizer.lars"), "LARS"),
    ("pytorch_optimizer LARS", ("pytorch_optimizer==4.1.0", "pytorch_optimizer.optimizer.lars"), "LARS"),
)
LAMB_PEERS = (
    ("timm Lamb", ("timm==1.0.31", "timm.optim.lamb"), "Lamb"),
    ("torch_optimizer Lamb", ("torch_optimizer==0.3.0", "torch_optimizer.lamb"), "Lamb"),
    ("pytorch_optimizer Lamb", ("pytorch_optimizer==4.1.0", "pytorch_optimizer.optimizer.lamb"), "Lamb"),
)

Build = Callable[[list[Parameter]], torch.optim.Optimizer]


def find(module: tuple[str, str], name: str) -> Callable[..., torch.optim.Optimizer] | None:
    """Return a published optimizer, None where it cannot be installed."""
    try:
        return getattr(peer(*module), name)
    except pytest.skip.Exception as reason:
        print(f"without {name} of {module[0]}: {reason}")
        return None


def optimizers() -> dict[str, tuple[str, Build]]:
    """What is timed: the name of its floor, and how it is built."""
    lars = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-4}
    lamb = {"lr": 1e-3, "weight_decay": 0.01}
    built: dict[str, tuple[str, Build]] = {
        "SGD(fused=True)": ("SGD(fused=True)", lambda params: SGD(params, **lars, fused=True)),
        "LARS": ("SGD(fused=True)", lambda params: LARS(grouped(params), **lars)),
        "LARS(nesterov=True)": (
            "SGD(fused=True)",
            lambda params: LARS(grouped(params), **lars, nesterov=True),
        ),
        "LARS(fused=False)": ("SGD(fused=True)", lambda params: LARS(grouped(params), **lars, fused=False)),
    }
    for label, module, name in LARS_PEERS:
        if published := find(module, name):
            built[label] = "SGD(fused=True)", partial(published, **lars)
    built["AdamW(fused=True)"] = (
        "AdamW(fused=True)",
        lambda params: AdamW(params, **lamb, fused=True),
    )
    built["LAMB"] = "AdamW(fused=True)", lambda params: LAMB(grouped(params), **lamb)
    built["LAMB(fused=False)"] = (
        "AdamW(fused=True)",
        lambda params: LAMB(grouped(params), **lamb, fused=False),
    )
    for label, module, name in LAMB_PEERS:
        if published := find(module, name):
            built[label] = "AdamW(fused=True)", partial(published, **lamb)
    return built


def measure(name: str, rounds: int) -> Table:
    """Time every optimizer on one model's layers."""
    shapes = SHAPES[name]()
    size = sum(torch.Size(shape).numel() for shape in shapes)
    ready = {label: (floor, build(parameters(shapes))) for label, (floor, build) in optimizers().items()}
    times: dict[str, list[float]] = {label: [] for label in ready}
    for _, optimizer in ready.values():
        optimizer.step()
    for _ in track(range(rounds), description=name, transient=True):
        for label, (_, optimizer) in ready.items():
            start = time.perf_counter()
            optimizer.step()
            times[label].append(1e3 * (time.perf_counter() - start))
    medians = {label: statistics.median(of_optimizer) for label, of_optimizer in times.items()}
    table = Table(
        "Optimizer",
        "Median ms",
        "Quartiles",
        "Of the fused floor",
        title=f"{name}: {len(shapes)} tensors, {size / 1e6:.1f} M",
    )
    for label, (floor, _) in ready.items():
        low, _, high = statistics.quantiles(times[label], n=4)
        ratio = medians[label] / medians[floor]
        table.add_row(label, f"{medians[label]:.1f}", f"{low:.1f} to {high:.1f}", f"{ratio:.2f}")
    return table


def main() -> None:
    """Read the command line and print a table for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=["resnet50"], help="Whose layers."
    )
    parser.add_argument("--rounds", type=int, default=15, help="Steps of each optimizer.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of torch.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    for name in arguments.shapes:
        console.print(measure(name, arguments.rounds))


if __name__ == "__main__":
    main()
