"""Ranks with FSDP2, the last of which cannot save, as its disk is full."""

from contextlib import nullcontext

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lightning_lars import param_groups
from tests.support.full_disk import full_disk
from tests.workers.elastic import RATES, sharded, train


def save(net, optimizer, path):
    model, state = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=path)


def load(net, optimizer, path):
    model, state = get_state_dict(net, optimizer)
    saved = {"model": model, "optimizer": state}
    dcp.load(saved, checkpoint_id=path)
    set_state_dict(net, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])


def start(name):
    net = sharded(name)
    return net, RATES[name](param_groups(net))


def end(net):
    return {key: p.full_tensor().detach() for key, p in net.named_parameters()}


def go_on_or_resume(name, folder):
    """Return the error of a save in the middle, where the run ends, and where one that resumes does."""
    ranks = dist.get_rank(), dist.get_world_size()
    run = start(name)
    train(*run, slice(0, 2), *ranks)
    save(*run, f"{folder}/first")
    train(*run, slice(2, 5), *ranks)
    is_full = dist.get_rank() == dist.get_world_size() - 1
    message = None
    try:
        with full_disk() if is_full else nullcontext():
            save(*run, f"{folder}/second")
    except CheckpointException as error:
        message = str(error)
    train(*run, slice(5, 8), *ranks)

    resumed = start(name)
    load(*resumed, f"{folder}/first")
    train(*resumed, slice(2, 8), *ranks)
    return message, end(run[0]), end(resumed[0])
