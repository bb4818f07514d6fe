"""Ways to distribute a network over two or four ranks, each with its optimizer."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from lightning_lars import param_groups
from tests.support.small_network import CASES, RATES, Block, network, optimizer_of


class Setup(NamedTuple):
    """A network as one process holds it."""

    net: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    share: int
    shares: int

    def part(self, batch):
        """The samples of this process."""
        return batch.chunk(self.shares)[self.share]

    def values(self):
        """The whole parameters by name."""
        if isinstance(self.wrapped, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(self.wrapped, writeback=False):
                return {
                    name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                    for name, p in self.wrapped.named_parameters()
                }
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in self.net.named_parameters()
        }


def alone(case):
    """One process, one device."""
    net = network()
    return Setup(net, net, optimizer_of(case, net), 0, 1)


def ddp(case):
    net = network()
    wrapped = DistributedDataParallel(net, find_unused_parameters=True)
    return Setup(net, wrapped, optimizer_of(case, net), dist.get_rank(), dist.get_world_size())


def ddp_zero(case):
    net = network()
    wrapped = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer_class, options = CASES[case]
    groups = [{**group, "params": [p for _, p in group["params"]]} for group in param_groups(net)]
    optimizer = ZeroRedundancyOptimizer(groups, optimizer_class, **RATES[optimizer_class], **options)
    return Setup(net, wrapped, optimizer, dist.get_rank(), dist.get_world_size())


def fsdp1(case, strategy, **options):
    net = network()
    wrapped = FullyShardedDataParallel(
        net,
        device_id=torch.device("cpu"),
        sharding_strategy=strategy,
        use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        **options,
    )
    return Setup(net, wrapped, optimizer_of(case, wrapped), dist.get_rank(), dist.get_world_size())


def full_shard(case):
    return fsdp1(case, ShardingStrategy.FULL_SHARD)


def shard_grad_op(case):
    return fsdp1(case, ShardingStrategy.SHARD_GRAD_OP)


def no_shard(case):
    return fsdp1(case, ShardingStrategy.NO_SHARD)


def hybrid_shard(case):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return fsdp1(case, ShardingStrategy.HYBRID_SHARD, device_mesh=mesh)


def fsdp2(case, mesh=None):
    net = network()
    for block in (net.one, net.two, net.unused):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return Setup(net, net, optimizer_of(case, net), dist.get_rank(), dist.get_world_size())


def hsdp(case):
    return fsdp2(case, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def parallelize(net, mesh):
    for block in (net.one, net.two, net.unused):
        parallelize_module(block, mesh, {"widen": ColwiseParallel(), "narrow": RowwiseParallel()})


def tensor_parallel(case):
    net = network()
    parallelize(net, init_device_mesh("cpu", (2,)))
    return Setup(net, net, optimizer_of(case, net), 0, 1)


def sequence_parallel(case):
    net = network()
    mesh = init_device_mesh("cpu", (2,))
    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "widen": ColwiseParallel(input_layouts=Shard(0)),
        "narrow": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
    }
    for block in (net.one, net.two, net.unused):
        parallelize_module(block, mesh, plan)
    net.divide = lambda h: DTensor.from_local(h, mesh, [Replicate()]).redistribute(placements=[Shard(0)])
    net.gather = lambda h: h.full_tensor()
    return Setup(net, net, optimizer_of(case, net), 0, 1)


def fsdp2_tensor_parallel(case):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    net = network()
    parallelize(net, mesh["tensor"])
    for block in (net.one, net.two, net.unused):
        fully_shard(block, mesh=mesh["data"])
    fully_shard(net, mesh=mesh["data"])
    return Setup(net, net, optimizer_of(case, net), mesh.get_local_rank("data"), 2)


SETUPS = {
    make.__name__: make
    for make in (
        ddp,
        ddp_zero,
        full_shard,
        shard_grad_op,
        no_shard,
        fsdp2,
        tensor_parallel,
        sequence_parallel,
        hsdp,
        hybrid_shard,
        fsdp2_tensor_parallel,
    )
}
ON_FOUR = ["hsdp", "hybrid_shard", "fsdp2_tensor_parallel"]
