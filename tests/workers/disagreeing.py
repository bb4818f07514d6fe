"""Ranks that shard other layers than each other, which they find out at their first step."""

from unittest.mock import patch

import torch.distributed as dist

from lightning_lars import LAMB
from lightning_lars.sharding.shards import local
from tests.support.setups import SETUPS, Setup
from tests.support.small_network import batches
from tests.workers.equal_to_one_device import step


def first_steps(changes, setup="fsdp2"):
    """Take a step for each change, with a new network."""
    return {change: first_step(change, setup) for change in changes}


def first_step(change, setup):
    """Take a step in which the last rank has something else; return the error, and whether anything moved."""
    here: Setup = SETUPS[setup]("LAMB")
    params = [(name, p) for name, p in here.net.named_parameters() if p.requires_grad]
    differs = dist.get_rank() == dist.get_world_size() - 1
    if differs:
        if change == "order":
            params.reverse()
        elif change == "fewer":
            params = params[:-1]
        elif change == "names":
            params = [(f"my_{name}", p) for name, p in params]
        elif change == "excluded":
            params = [
                {"params": params[:1]},
                {"params": params[1:], "layer_adaptation": False},
            ]
    optimizer = LAMB(params, lr=0.05)
    here = here._replace(optimizer=optimizer)
    before = local_values(here)
    patched = "lightning_lars.sharding.agreement.version"
    with patch(patched, lambda _: "9.9" if differs and change == "versions" else "1.0"):
        try:
            step(here, batches()[0])
        except RuntimeError as error:
            message = str(error)
        else:
            message = None
    after = local_values(here)
    return message, all(bool((before[name] == after[name]).all()) for name in before), len(optimizer.state)


def local_values(setup):
    """What this rank has of each parameter, which takes no exchange with ranks that may have raised."""
    return {name: local(p.detach()).clone() for name, p in setup.net.named_parameters()}
