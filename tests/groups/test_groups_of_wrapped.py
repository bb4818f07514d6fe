"""The groups of a module are the same before and after a strategy wraps, flattens or shards it."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lightning_lars import explain_param_groups, param_groups
from tests.support.releases import has

fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
RANKS = 4
CPU = torch.device("cpu")


@pytest.fixture(params=[0, 3])
def _ranks(request):
    """A process group of which the other processes are not there: rank 3 has other parts than rank 0."""
    dist.init_process_group("fake", rank=request.param, world_size=RANKS, store=fake_pg.FakeStore())
    yield
    dist.destroy_process_group()


class OwnNorm(nn.Module):
    """A norm by its name, with a scale that is no vector."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 4))

    def forward(self, batch):
        return batch * self.scale


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.own = OwnNorm()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)
        self.gamma = nn.Parameter(torch.full((4,), 1e-6))

    def forward(self, batch):
        return batch + self.gamma * self.down(self.up(self.own(self.norm(batch))))


class Net(nn.Module):
    """Matrices, tables, gains and tokens, in blocks and outside of them."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 4))
        self.bias_table = nn.Parameter(torch.zeros(9, 2))
        self.scale = nn.Parameter(torch.ones(1))
        self.latents = nn.Parameter(torch.zeros(5, 4))
        self.tokens = nn.Embedding(1, 4)
        self.blocks = nn.Sequential(Block(), Block())
        self.module = nn.Linear(4, 1)

    def no_weight_decay(self):
        return {"latents", "module"}

    def forward(self, batch):
        return self.module(self.blocks(batch + self.cls_token[0] + self.pos_embed[0]) * self.scale)


class LightningNet(Net, LightningModule):
    pass


def fsdp1(module, **options):
    return FullyShardedDataParallel(
        module,
        use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy({Block, nn.Embedding}),
        device_id=CPU,
        **options,
    )


def fsdp2(module):
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in (*module.blocks, module.tokens):
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def tensor_parallel(module):
    mesh = init_device_mesh("cpu", (RANKS,))
    plan = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    return parallelize_module(module, mesh, plan)


def fsdp2_of_tensor_parallel(module):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    for block in module.blocks:
        parallelize_module(block, mesh["model"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(module, mesh=mesh["data"])


def ddp(module):
    # With torch 2.6 it cannot be left out.
    options = {"init_sync": False} if has("torch>=2.7") else {}
    return DistributedDataParallel(module, **options)


def checkpointed(module):
    module.blocks[1] = checkpoint_wrapper(module.blocks[1])
    return module


def compiled(module):
    return torch.compile(module, backend="eager")  # inductor would be imported, and is not called


def fabric(module):
    return Fabric(accelerator="cpu", devices=1).setup(module)


WRAPPERS = {
    "fsdp1": fsdp1,
    "fsdp1 around checkpointing": lambda module: fsdp1(checkpointed(module)),
    "fsdp1 compiled": lambda module: compiled(fsdp1(module)),
    "fsdp2": fsdp2,
    "tensor parallel": tensor_parallel,
    "fsdp2 of tensor parallel": fsdp2_of_tensor_parallel,
    "fsdp2 compiled": lambda module: compiled(fsdp2(module)),
    "ddp": ddp,
    "ddp compiled": lambda module: compiled(ddp(module)),
    "compiled ddp": lambda module: ddp(compiled(module)),
    "data parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "checkpointed": checkpointed,
    "compiled": compiled,
}


def rows(module, **options):
    """Names, shapes, modules, groups and rules."""
    columns = explain_param_groups(module, **options).columns
    return list(zip(*(column.cells for column in columns), strict=True))


@pytest.mark.usefixtures("_ranks")
@pytest.mark.parametrize("name", WRAPPERS)
def test_names_groups_layers_and_rules_match_the_module(name):
    wrapped = WRAPPERS[name](Net())
    assert rows(wrapped) == rows(Net())
    layered = rows(wrapped, layer_decay=0.5)
    assert layered == rows(Net(), layer_decay=0.5)
    assert {group.split(".")[0] for _, _, _, group, *_ in layered} == {f"layer_{depth}" for depth in range(4)}


@pytest.mark.parametrize("compiles", [False, True])
def test_names_groups_and_rules_match_the_module_under_fabric(compiles):
    module = Net()
    assert rows(fabric(compiled(module) if compiles else module)) == rows(Net())


@pytest.mark.usefixtures("_ranks")
def test_names_under_fabric_have_no_prefix_of_ddp_either():
    wrapped = fabric(Net())
    wrapped._forward_module = ddp(wrapped._forward_module)
    assert rows(wrapped) == rows(Net())


def test_the_table_shows_the_groups():
    groups = {group["name"]: [name for name, _ in group["params"]] for group in param_groups(Net())}
    blocks = [f"blocks.{number}.{layer}.weight" for number in (0, 1) for layer in ("up", "down")]
    assert groups["adapted"] == ["bias_table", "tokens.weight", *blocks]


@pytest.mark.usefixtures("_ranks")
def test_a_lightning_module_inside_of_fsdp_knows_its_shapes_from_the_model_of_its_trainer():
    inside = LightningNet()
    outside = fsdp1(inside)
    with pytest.raises(
        ValueError,
        match=r"the shape of 'cls_token' must be known, .* only the wrapper around",
    ):
        param_groups(inside)
    inside._trainer = SimpleNamespace(model=outside)
    assert rows(inside) == rows(LightningNet())


@pytest.mark.usefixtures("_ranks")
def test_a_part_that_lacks_no_shape_is_grouped_inside_of_fsdp():
    inside = Net()
    outside = fsdp1(inside)
    assert rows(inside.blocks) == rows(Net().blocks)
    assert rows(outside.blocks[0]) == rows(Net().blocks[0])


@pytest.mark.usefixtures("_ranks")
def test_layers_that_fsdp_has_put_into_one_parameter_are_refused():
    flat = FullyShardedDataParallel(Net(), device_id=CPU)
    with pytest.raises(
        ValueError, match=r"got '_flat_param', into which FSDP has flattened many: pass use_orig_params"
    ):
        param_groups(flat)
    off = dict.fromkeys(["exclude_norm", "exclude_bias", "exclude_gain"], False)
    assert [group["name"] for group in param_groups(flat, **off)] == ["adapted"]
    with pytest.raises(ValueError, match="into which FSDP has flattened many"):
        param_groups(flat, **off, exclude=nn.Embedding)
