"""Recomputes running statistics on two ranks under a strategy."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_lars.callbacks.precise_batch_norm import PreciseBatchNorm
from tests.support.boring import trainer
from tests.support.normed import BATCH_SIZE, Noisy, Normed
from tests.workers.lightning_strategies import CPUFSDPStrategy

EPOCHS, PASSES = 2, 2


class Plain(Normed, LightningModule):
    """Notes the indices of the samples in every recomputation."""

    def __init__(self):
        super().__init__(DataLoader(Noisy(), batch_size=BATCH_SIZE, shuffle=True))
        self.passed = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        # Without a gradient, as training is not.
        if not torch.is_grad_enabled():
            self.passed.append(batch[1].tolist())
        return batch

    def on_train_end(self):
        root = self.trainer.model
        fsdp1 = isinstance(root, FullyShardedDataParallel)
        with FullyShardedDataParallel.summon_full_params(root) if fsdp1 else nullcontext():
            self.final = {
                name.replace("_fsdp_wrapped_module.", ""): getattr(value, "full_tensor", value.clone)()
                for name, value in (*self.named_parameters(), *self.named_buffers())
            }


class SynchronizedOnCPU(nn.SyncBatchNorm):
    """What torch has for GPUs only: normalizes by the batch of all processes."""

    def forward(self, x):
        whole = torch.cat(all_gather(x)) if self.training else x
        y = F.batch_norm(
            *(whole, self.running_mean, self.running_var, self.weight, self.bias),
            *(self.training, self.momentum, self.eps),
        )
        return y.chunk(len(whole) // len(x))[dist.get_rank() if self.training else 0]


class Own(Plain):
    def forward(self, x):
        if not torch.is_grad_enabled():
            raise AssertionError("is not what takes the batch")
        return super().forward(x)

    def precise_batch_norm_forward(self, batch):
        self.net(batch[0])


class Sharded(Plain):
    def configure_model(self):
        if not any(hasattr(p, "device_mesh") for p in self.parameters()):
            self.shard()

    def shard(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Synchronized(Sharded):
    def __init__(self):
        super().__init__()
        self.net[1], self.net[5] = SynchronizedOnCPU(5).double(), SynchronizedOnCPU(4).double()


class TensorParallel(Sharded):
    def shard(self):
        whole = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"0": whole, "4": whole})


def mesh(data_parallel, tensor_parallel):
    return ModelParallelStrategy(
        data_parallel_size=data_parallel,
        tensor_parallel_size=tensor_parallel,
        save_distributed_checkpoint=False,
    )


RUNS = {
    "ddp": (Plain, DDPStrategy),
    "fsdp1": (Plain, CPUFSDPStrategy),
    "fsdp1, own forward": (Own, CPUFSDPStrategy),
    "fsdp2": (Sharded, lambda: mesh(2, 1)),
    # DDP takes such layers on GPUs only.
    "synchronized": (Synchronized, lambda: mesh(2, 1)),
    "tensor parallel": (TensorParallel, lambda: mesh(1, 2)),
}


def train(run, folder):
    """Train for two epochs; return the samples of all steps and recomputations, and the last state."""
    module_class, strategy = RUNS[run]
    module = module_class()
    trainer(
        folder,
        callbacks=[PreciseBatchNorm(PASSES)],
        strategy=strategy(),
        devices=2,
        max_epochs=EPOCHS,
        limit_val_batches=0,
    ).fit(module)
    return {"trained": module.seen, "passed": module.passed, "state": module.final}
