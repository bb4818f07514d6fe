"""Trains on two ranks, of which the second fails in a step after the one that is saved."""

import importlib
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard

from lightning_lars import LAMB
from tests.support.small_network import RESUMED
from tests.workers.lightning_strategies import FSDP2, FULL, OPTIMIZERS, Used, ddp, fit, model_parallel

FAILS_NOW = "fails now"


class Fails:
    """Has an error in the optimizer's step, between the backward pass and the update."""

    def on_before_optimizer_step(self, optimizer):
        if self.global_rank == 1 and self.global_step == RESUMED:
            print(FAILS_NOW, file=sys.stderr, flush=True)
            self.fail(optimizer.param_groups[0]["params"][0])


class Sparse(Fails, Used):
    """Has a gradient that the optimizer refuses."""

    def fail(self, p):
        p.grad = p.grad.to_sparse()


class Raises(Fails, FSDP2):
    """Raises while the others wait for the norms of its shards."""

    def fail(self, p):
        raise MemoryError("rank 1 has no memory left")


RUNS = {
    "ddp": (Sparse, ddp),
    "ddp fork": (Sparse, lambda: DDPStrategy(start_method="fork", find_unused_parameters=True)),
    "fsdp2": (Raises, lambda: model_parallel(2, 1, **FULL)),
}


def wait_in_vain(seconds):
    """Take a step that the second rank leaves out; return the error, with that timeout of the group."""
    mesh = DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=seconds)), "cpu")
    net = fully_shard(nn.Linear(4, 4), mesh=mesh)
    optimizer = LAMB(net.named_parameters())
    error = None
    for step in range(2):
        net(torch.ones(2, 4)).sum().backward()
        if step == 0 or dist.get_rank() == 0:
            try:
                optimizer.step()
            except RuntimeError as caught:
                error = str(caught)
    # Of all processes, whose group waits longer: until then, both are there.
    dist.barrier()
    return error


def share_no_folder(folder, examples):
    """Start a run of the example on a folder of this rank's own; return the error."""
    sys.path.insert(0, examples)
    shared_folder = importlib.import_module("train").SharedFolder(Path(folder) / f"{dist.get_rank()}.ckpt")
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=ddp(), max_steps=1, logger=False, callbacks=[shared_folder]
    )
    try:
        trainer.fit(Used(optimizer=OPTIMIZERS["LAMB"]))
    except RuntimeError as error:
        return str(error)
    return None


@record
def main():
    folder, name = sys.argv[1:]
    module_class, strategy = RUNS[name]
    fit(Path(folder), module_class, OPTIMIZERS["LAMB"], strategy(), {}, devices=2)


if __name__ == "__main__":
    main()
