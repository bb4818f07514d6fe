"""Edge cases of optimizers on two ranks, apart from training from beginning to end."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_lars import LARS
from lightning_lars.trust_ratios.step_statistics import StepStatistics
from tests.support.setups import Setup
from tests.support.small_network import Block, batches, floats, network
from tests.workers.equal_to_one_device import step

WRAPPED_AFTER = 2


def gradient_on_one_process(optimizer_class):
    """Trust ratio of a layer whose other half gets no gradient, as an expert without tokens."""
    whole = torch.arange(1.0, 13).view(4, 3)
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    if dist.get_rank() == 0:
        weight.grad = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False)
    optimizer = optimizer_class([weight], weight_decay=0.0)
    optimizer.step()
    return floats(optimizer.trust_ratios())


def gradient_of_one_half(optimizer_class):
    """The same on one device."""
    weight = nn.Parameter(torch.arange(1.0, 13).view(4, 3))
    weight.grad = torch.tensor([1.0, 1, 0, 0])[:, None].expand(4, 3)
    optimizer = optimizer_class([weight], weight_decay=0.0)
    optimizer.step()
    return floats(optimizer.trust_ratios())


def wrapped_late():
    """Parameters where FSDP1 wraps the network after the first steps, of an optimizer without state."""
    net = network()
    optimizer = LARS(net.parameters(), lr=0.2, momentum=0.0, trust_coefficient=0.1)
    here = Setup(net, net, optimizer, 0, 1)
    for batch in batches()[:WRAPPED_AFTER]:
        step(here, batch)
    wrapped = FullyShardedDataParallel(
        net,
        device_id=torch.device("cpu"),
        use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
    )
    there = Setup(net, wrapped, optimizer, dist.get_rank(), dist.get_world_size())
    for batch in batches()[WRAPPED_AFTER:]:
        step(there, batch)
    return there.values()


def updates_of_plain_optimizer(setup):
    """What a step of torch's AdamW did to every layer, by quantity, as every rank sees it."""
    here = setup("LARS")
    # Named as in the network, whatever wraps it.
    named = [(name.replace("_fsdp_wrapped_module.", ""), p) for name, p in here.net.named_parameters()]
    optimizer = torch.optim.AdamW(named, lr=0.1, foreach=False)
    statistics = StepStatistics(optimizer, lambda: True, gradients=True)
    step(here._replace(optimizer=optimizer), batches()[0])
    flushed = statistics.flush()
    return {quantity: {name: of.mean for name, of in layers.items()} for quantity, layers in flushed.items()}
