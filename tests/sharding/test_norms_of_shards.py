"""Norms of whole layers from local shards, for all placements on a 2 x 2 x 2 mesh of eight ranks."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_lars.sharding.norms import whole_norms
from lightning_lars.sharding.shards import find_shards, local

simulation = pytest.importorskip(
    "torch.distributed._local_tensor", reason="this torch cannot simulate processes"
)
fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

RANKS = 8
# Uneven, with empty shards on some processes; a bias; a scalar; even; uneven along both with empty shards.
SHAPES = [(5, 7), (1, 3), (6,), (), (8, 8), (3, 11)]
PLACEMENTS = [
    (shape, placements)
    for shape in SHAPES
    for placements in product([Replicate(), *(Shard(dim) for dim in range(len(shape)))], repeat=3)
]


@pytest.fixture
def mesh():
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=fake_pg.FakeStore())
    with simulation.LocalTensorMode(RANKS):
        yield init_device_mesh("cpu", (2, 2, 2))
    dist.destroy_process_group()


def divided(layer, mesh, placements, order=(0, 1, 2)):
    """The layer as each process has its part, halved by one mesh dimension after the other."""
    parts = {}
    for rank in range(RANKS):
        coordinates = rank // 4, rank // 2 % 2, rank % 2
        part = layer
        for dimension in order:
            if not placements[dimension].is_replicate():
                along = placements[dimension].dim
                halves = part.tensor_split([-(-part.shape[along] // 2)], dim=along)
                part = halves[coordinates[dimension]]
        parts[rank] = part.clone()
    here = simulation.LocalTensor(parts)
    return DTensor.from_local(
        here, mesh, placements, run_check=False, shape=layer.shape, stride=layer.stride()
    )


def norms_of(parts):
    return [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]


def norms_here(parts):
    """The norms of what each process has, by process."""
    return [[on_rank(part, rank).double().norm().item() for part in parts] for rank in range(RANKS)]


def on_rank(tensor, rank):
    return tensor._local_tensors[rank] if isinstance(tensor, simulation.LocalTensor) else tensor


def on_every_process(norms):
    """The same norms on each process, as numbers."""
    return [[on_rank(norm, rank).item() for norm in norms] for rank in range(RANKS)]


def test_there_are_as_many_placements_as_three_mesh_dimensions_allow():
    assert len(PLACEMENTS) == 4 * 27 + 8 + 1


@pytest.mark.timeout(180)  # eight processes are simulated in this one
@pytest.mark.parametrize("shapes", [SHAPES[1:2], pytest.param(SHAPES, marks=pytest.mark.slow)], ids=len)
def test_every_placement_has_the_norm_of_the_whole_layer_in_three_collectives(mesh, shapes):
    torch.manual_seed(0)
    placed = [(shape, placements) for shape, placements in PLACEMENTS if shape in shapes]
    layers = [torch.randn(shape) for shape, _ in placed]
    shards = [divided(layer, mesh, placements) for layer, (_, placements) in zip(layers, placed, strict=True)]
    where = find_shards([(str(number), shard) for number, shard in enumerate(shards)])
    parts = [local(shard) for shard in shards]
    with CommDebugMode() as communication:
        norms = whole_norms(norms_of(parts), list(where.values()))
    whole = norms_here(layers)[0]
    for process in on_every_process(norms):
        assert process == pytest.approx(whole, rel=1e-12)
    assert communication.get_total_counts() == 3
    # What the collectives are for: the last process has no part that is like the whole.
    wrong = [here != pytest.approx(there) for here, there in zip(norms_here(parts)[-1], whole, strict=True)]
    assert wrong == [any(p.is_shard() for p in placements) for _, placements in placed]


@pytest.mark.parametrize("shape", [(8, 4), (5, 4), (3, 2)])
def test_a_layer_sharded_by_tensor_parallelism_and_fsdp2_has_the_norm_of_the_whole(mesh, shape):
    torch.manual_seed(0)
    layer = torch.randn(shape)
    placements = [_StridedShard(0, split_factor=2), Shard(0), Replicate()]
    shard = divided(layer, mesh, placements, order=(1, 0))
    norms = whole_norms(norms_of([local(shard)]), list(find_shards([("layer", shard)]).values()))
    for process in on_every_process(norms):
        assert process == pytest.approx(norms_here([layer])[0], rel=1e-12)
