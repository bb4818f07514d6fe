"""What a step of LAMB costs on up to thousands of ranks, one of which is simulated.

    python -m benchmarks.ranks --picture docs/ranks.png

Collectives are counted in a step of the whole model on the meta device, which has shapes and no memory. The
time of the host, and the Python memory that the optimizer keeps, are those of a model of as many layers of at
most 16 x 16 on the CPU, on which arithmetic takes next to no time. The latency is that of NCCL's own model.
"""

import argparse
import gc
import time
import tracemalloc
from collections.abc import Sequence
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.model_shapes import grouped
from benchmarks.sharded_models import MESHES, MODELS, NODE, Model, narrowed, sharded, simulated
from lightning_lars import LAMB

# Microseconds of an all-reduce of a few KiB, by the model in NCCL's src/graph/tuning.cc (2.12, protocol LL),
# by tree and by ring: at its beginning, for each hop within a node of GPUs with NVLink, and between nodes.
TREE, RING = (4.4, 1.8 * 0.52, 5.0), (3.6, 1.8 * 0.47, 2.7)


class Cost(NamedTuple):
    """What a step costs on a rank."""

    parameters: int
    layers: int
    all_reduces: int
    bytes: int
    milliseconds: float
    kept: int
    """Bytes of Python objects that the optimizer keeps."""


class Collectives(TorchDispatchMode):
    """Records the bytes that each collective is given."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.bytes.append(sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)))
        return func(*args, **(kwargs or {}))


def lamb(net: nn.Module) -> LAMB:
    return LAMB(grouped(list(net.parameters())))


def collectives(model: Model, mesh_name: str, world_size: int) -> tuple[int, int, list[int]]:
    """Return the numbers of parameters and layers, and the bytes of each collective of a step."""
    with simulated(world_size):
        net = sharded(model, MESHES[mesh_name](world_size), "meta")
        optimizer = lamb(net)
        with Collectives() as seen:
            optimizer.step()
        params = list(net.parameters())
    return sum(p.numel() for p in params), len(params), seen.bytes


def host(model: Model, mesh_name: str, world_size: int, rounds: int) -> tuple[float, int]:
    """Return the milliseconds of the fastest step, and the bytes that the optimizer keeps in Python."""
    with simulated(world_size):
        net = sharded(narrowed(model), MESHES[mesh_name](world_size), "cpu")
        # What is cached by the layers is not the optimizer's.
        lamb(net).step()
        gc.collect()
        tracemalloc.start()
        optimizer = lamb(net)
        for _ in range(2):
            optimizer.step()
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        times = []
        for _ in range(rounds):
            start = time.thread_time_ns()
            optimizer.step()
            times.append((time.thread_time_ns() - start) / 1e6)
    return min(times), kept


def cost(model: Model, mesh_name: str, world_size: int, rounds: int) -> Cost:
    """Return what a step of LAMB costs."""
    parameters, layers, sent = collectives(model, mesh_name, world_size)
    milliseconds, kept = host(model, mesh_name, world_size, rounds)
    return Cost(parameters, layers, len(sent), sum(sent), milliseconds, kept)


def latency(constants: tuple[float, float, float], ranks: int) -> float:
    """Return the microseconds that a short all-reduce of GPUs takes, in nodes of eight.

    A message passes every GPU of its node twice, and by a tree as often the logarithm of the number of nodes,
    by a ring all nodes.
    """
    start, within, between = constants
    in_node = min(ranks, NODE)
    nodes = ranks // in_node
    if constants is TREE:
        return start + 2 * ((in_node - 1) * within + log2(nodes) * between)
    return start + 2 * (nodes * (in_node - 1) * within + (nodes - 1) * between)


def draw(path: Path, costs: dict[tuple[str, str, int], Cost]) -> None:
    """Save the time of the host on FSDP2, and the latency, over the number of ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for model in dict.fromkeys(model for model, _, _ in costs):
        known = {
            ranks: each for (name, mesh, ranks), each in costs.items() if (name, mesh) == (model, "FSDP2")
        }
        layers = next(iter(known.values())).layers
        values = [each.milliseconds for each in known.values()]
        left.plot(list(known), values, "o-", label=f"{model}: {layers:,} layers")
    left.set_ylabel("ms of the host per step, FSDP2")
    left.set_ylim(bottom=0)
    sizes = sorted({ranks for _, _, ranks in costs})
    for label, constants in (("ring", RING), ("tree, as NCCL chooses", TREE)):
        right.loglog(sizes, [latency(constants, size) for size in sizes], "o-", label=label)
    right.set_ylabel("us of the all-reduce, by NCCL's model")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("ranks")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def measure(models: Sequence[str], sizes: Sequence[int], rounds: int) -> dict[tuple[str, str, int], Cost]:
    """Return what a step costs by model, mesh and number of ranks."""
    runs = [
        (model, mesh, size)
        for model in models
        for mesh in MESHES
        if not (model.startswith("ResNet") and mesh.endswith("TP"))  # convolutions are not divided
        for size in sizes
    ]
    return {
        (model, mesh, size): cost(MODELS[model](), mesh, size, rounds)
        for model, mesh, size in track(runs, description="ranks", transient=True)
    }


def main() -> None:
    """Read the command line, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="Models.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096], help="World sizes.")
    parser.add_argument("--rounds", type=int, default=15, help="Timed steps.")
    parser.add_argument("--picture", type=Path, help="Where to save a PNG.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    costs = measure(arguments.models, arguments.ranks, arguments.rounds)
    table = Table(
        "Model", "Parameters", "Layers", "Mesh", "Ranks", "All-reduces", "Bytes", "Host ms", "KiB kept"
    )
    for (model, mesh, size), each in costs.items():
        table.add_row(
            model,
            f"{each.parameters:,}",
            f"{each.layers:,}",
            mesh,
            f"{size:,}",
            str(each.all_reduces),
            f"{each.bytes:,}",
            f"{each.milliseconds:.1f}",
            f"{each.kept / 1024:,.0f}",
        )
    Console().print(table)
    if arguments.picture:
        draw(arguments.picture, costs)


if __name__ == "__main__":
    main()
