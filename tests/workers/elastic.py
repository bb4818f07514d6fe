"""Trains with FSDP2 on other numbers of ranks after each checkpoint of ``torch.distributed.checkpoint``."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from lightning_lars import LAMB, LARS, LAMB8bit, param_groups

RATES = {
    "LARS": lambda groups: LARS(groups, lr=0.2, trust_coefficient=0.1, weight_decay=0.1),
    "LAMB": lambda groups: LAMB(groups, lr=0.05, weight_decay=0.1),
    "LAMB8bit": lambda groups: LAMB8bit(groups, lr=0.05, weight_decay=0.1, min_8bit_size=4096),
}
STEPS_OF_EACH = 2


def network(name):
    """Layers whose rows two, three and four ranks can share evenly, in blocks of 8-bit state.

    In double precision, so that sums in another order make no difference; 8-bit state is of float32.
    """
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 192), nn.Linear(192, 12))
    return net if name == "LAMB8bit" else net.double()


def sharded(name):
    net = network(name)
    for layer in net:
        fully_shard(layer)
    return fully_shard(net)


def batches():
    """Twelve samples a step, the same every time, which as many ranks share evenly."""
    return torch.randn(4 * STEPS_OF_EACH, 12, 64, generator=torch.Generator().manual_seed(2))


def train(net, optimizer, steps, rank=0, ranks=1):
    for batch in batches()[steps].to(net[0].weight.dtype):
        optimizer.zero_grad()
        net(batch.chunk(ranks)[rank]).square().sum(1).mean().backward()
        optimizer.step()


def alone(name):
    """Take all steps on one device; return where they end."""
    net = network(name)
    train(net, RATES[name](param_groups(net)), slice(None))
    return {key: p.detach() for key, p in net.named_parameters()}


def go_on(names, folder, phase):
    """Load the checkpoint of the phase before, if any, take the steps of this one, and save another."""
    ends = {}
    for name in names:
        net = sharded(name)
        optimizer = RATES[name](param_groups(net))
        if phase:
            model, state = get_state_dict(net, optimizer)
            saved = {"model": model, "optimizer": state}
            dcp.load(saved, checkpoint_id=f"{folder}/{name}-{phase - 1}")
            set_state_dict(
                net, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
            )
        first = phase * STEPS_OF_EACH
        train(net, optimizer, slice(first, first + STEPS_OF_EACH), dist.get_rank(), dist.get_world_size())
        model, state = get_state_dict(net, optimizer)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=f"{folder}/{name}-{phase}")
        ends[name] = {key: p.full_tensor().detach() for key, p in net.named_parameters()}
    return ends


def error_of_loading(folder):
    """Return the error of loading a checkpoint of LAMB, None if it can be loaded."""
    net = sharded("LAMB")
    model, state = get_state_dict(net, RATES["LAMB"](param_groups(net)))
    try:
        dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder)
    except CheckpointException as error:
        return str(error)
    return None
