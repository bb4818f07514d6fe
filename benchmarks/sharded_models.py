"""Well-known models, sharded as FSDP2 and tensor parallelism do, on any number of simulated ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

Layer = tuple[tuple[int, ...], Placement]
"""A shape, and how tensor parallelism places it."""

Model = list[list[Layer]]
"""The layers of each block that ``fully_shard`` wraps; those of the root are last."""

WHOLE = Replicate()


def gpt(width: int, depth: int) -> Model:
    """Brown et al. 2020, with biases; tensor parallelism as in Megatron-LM (Shoeybi et al. 2019)."""
    rows, columns = Shard(0), Shard(1)
    block: list[Layer] = [((3 * width, width), rows), ((3 * width,), rows)]
    block += [((width, width), columns), ((width,), WHOLE)]
    block += [((4 * width, width), rows), ((4 * width,), rows)]
    block += [((width, 4 * width), columns), ((width,), WHOLE)]
    block += 4 * [((width,), WHOLE)]
    root: list[Layer] = [((51200, width), rows), ((2048, width), WHOLE), *2 * [((width,), WHOLE)]]
    return [*depth * [block], root]


def resnet(depths: tuple[int, ...], width: int = 64) -> Model:
    """He et al. 2016, or wider (Zagoruyko and Komodakis 2016), without tensor parallelism."""
    blocks: Model = []
    before = width
    for stage, depth in enumerate(depths):
        inner = width * 2**stage
        for number in range(depth):
            convs = [(inner, before, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1)]
            convs += [(4 * inner, before, 1, 1)] if number == 0 else []
            shapes = [shape for conv in convs for shape in (conv, conv[:1], conv[:1])]
            blocks.append([(shape, WHOLE) for shape in shapes])
            before = 4 * inner
    root = [(width, 3, 7, 7), (width,), (width,), (1000, before), (1000,)]
    return [*blocks, [(shape, WHOLE) for shape in root]]


MODELS: dict[str, Callable[[], Model]] = {
    "ResNet-50": partial(resnet, (3, 4, 6, 3)),
    "ResNet-200, 8 times as wide": partial(resnet, (3, 24, 36, 3), 512),
    "GPT 0.1 B": partial(gpt, 768, 12),
    "GPT 7 B": partial(gpt, 4096, 32),
    "GPT 100 B": partial(gpt, 10240, 80),
}

# Ranks that share a node, within which tensor parallelism and the shards of HSDP stay.
NODE = 8


class Mesh(NamedTuple):
    """The mesh that shards blocks, and that of tensor parallelism."""

    data: DeviceMesh
    tensor: DeviceMesh | None = None


def fsdp2(world_size: int) -> Mesh:
    return Mesh(init_device_mesh("cpu", (world_size,)))


def hsdp(world_size: int) -> Mesh:
    shards = min(NODE, world_size // 2)
    sizes = (world_size // shards, shards)
    return Mesh(init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")))


def fsdp2_tensor_parallel(world_size: int) -> Mesh:
    size = min(NODE, world_size // 2)
    mesh = init_device_mesh("cpu", (world_size // size, size), mesh_dim_names=("data", "tensor"))
    return Mesh(mesh["data"], mesh["tensor"])


MESHES = {"FSDP2": fsdp2, "HSDP": hsdp, "FSDP2 x TP": fsdp2_tensor_parallel}


@contextmanager
def simulated(world_size: int) -> Iterator[None]:
    """Be rank 0 of so many, of which the others do not exist: collectives return what they were given."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Block(nn.Module):
    """Layers without a forward pass."""

    def __init__(self, layers: list[Layer], mesh: Mesh, device: str) -> None:
        super().__init__()
        for number, (shape, placement) in enumerate(layers):
            value = torch.ones(shape, device=device)
            if mesh.tensor is not None:
                value = distribute_tensor(value, mesh.tensor, [placement])
            self.register_parameter(f"layer{number}", Parameter(value))


def sharded(model: Model, mesh: Mesh, device: str) -> nn.Module:
    """Return the model on a mesh, with gradients."""
    net = Block(model[-1], mesh, device)
    for number, layers in enumerate(model[:-1]):
        block = Block(layers, mesh, device)
        fully_shard(block, mesh=mesh.data)
        net.add_module(f"block{number}", block)
    fully_shard(net, mesh=mesh.data)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    return net


def narrowed(model: Model) -> Model:
    """Return a model of as many layers, on which a step spends next to no time."""
    return [[(tuple(min(n, 16) for n in shape), placement) for shape, placement in block] for block in model]
