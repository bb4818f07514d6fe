"""Trains with 8-bit state on two ranks."""

import io
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_lars import LAMB8bit, LARS8bit, param_groups
from tests.support.interpreter import prepare_once

CLASSES = {"LARS": LARS8bit, "LAMB": LAMB8bit}
STEPS, RESUMED = 4, 2


def network():
    """Layers that two processes share evenly, and one that they do not; the same every time."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 96), nn.Linear(96, 67))


def batches():
    """Eight samples a step, the same every time."""
    return torch.randn(STEPS, 8, 64, generator=torch.Generator().manual_seed(2))


def build(name, net):
    return CLASSES[name](param_groups(net), lr=0.1, weight_decay=0.1)


def step(net, optimizer, batch):
    optimizer.zero_grad()
    net(batch).square().sum(1).mean().backward()
    optimizer.step()


def values(net):
    """The whole parameters by name."""
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in net.named_parameters()
    }


def in_eight_bits(optimizer, net):
    """The names of layers whose state is in 8 bits here."""
    return [
        name.removeprefix("module.")
        for name, p in net.named_parameters()
        if any(hasattr(getattr(v, "_local_tensor", v), "codes") for v in optimizer.state[p].values())
    ]


def ddp():
    return DistributedDataParallel(network())


def fsdp2():
    net = network()
    for layer in net:
        fully_shard(layer)
    return fully_shard(net)


def read_again(saved):
    """What a file keeps of it."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


MAKES = {"ddp": ddp, "fsdp2": fsdp2}


def train(strategy, name):
    """Train, go on from a checkpoint of its middle, and tell what there was to see."""
    make = MAKES[strategy]
    net = make()
    optimizer = build(name, net)
    seen = {"values": []}
    saved = None
    for number, batch in enumerate(batches(), 1):
        step(net, optimizer, batch.chunk(2)[dist.get_rank()])
        seen["values"].append(values(net))
        if number == RESUMED:
            weights = {key: value.clone() for key, value in net.state_dict().items()}
            saved = read_again(get_optimizer_state_dict(net, optimizer))
            options = StateDictOptions(full_state_dict=True)
            seen["full"] = read_again(get_optimizer_state_dict(net, optimizer, options=options))
    seen["in eight bits"] = in_eight_bits(optimizer, net)
    resumed_net = make()
    resumed_net.load_state_dict(weights)
    resumed = build(name, resumed_net)
    set_optimizer_state_dict(resumed_net, resumed, saved)
    for batch in batches()[RESUMED:]:
        step(resumed_net, resumed, batch.chunk(2)[dist.get_rank()])
    seen["resumed"] = values(resumed_net)
    return seen


def in_triton():
    """The parameters after a step of the kernel for GPUs."""
    prepare_once()
    net = fsdp2()
    optimizer = CLASSES["LAMB"](param_groups(net), lr=0.1, weight_decay=0.1, fused=True)
    with patch("lightning_lars.optim.backends.choice.TRITON_DEVICES", {"cpu"}):
        step(net, optimizer, batches()[0].chunk(2)[dist.get_rank()])
    return values(net)


def refusal():
    """What is said where FullyShardedDataParallel divides the layers."""
    net = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = build("LARS", net)
    try:
        step(net, optimizer, batches()[0])
    except RuntimeError as error:
        return str(error)
    return None
