"""Trains with 8-bit state in Trainers on two processes, resumes, and leaves what each saw in a folder.

Run as ``python -m tests.workers.eight_bit_lightning FOLDER``, which starts the processes.
"""

import os
import sys
from functools import partial
from pathlib import Path

import lightning
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit, build_optimizer
from tests.workers.eight_bit import RESUMED, STEPS, batches, in_eight_bits, network, values

PAIRS = {"LARS": (LARS8bit, LARS), "LAMB": (LAMB8bit, LAMB)}


class Model(lightning.LightningModule):
    """The network, trained on those samples that are this process's share."""

    def __init__(self, optimizer_class):
        super().__init__()
        self.net = network()
        self.optimizer_class = optimizer_class

    def training_step(self, *_):
        # By number, as Lightning does not skip the batches that a checkpoint has seen.
        batch = batches()[self.trainer.global_step].chunk(2)[self.trainer.global_rank]
        return self.net(batch).square().sum(1).mean()

    def train_dataloader(self):
        return DataLoader(range(STEPS), batch_size=1)

    def configure_optimizers(self):
        options = {"trust_coefficient": 0.1} if issubclass(self.optimizer_class, LARS) else {}
        return build_optimizer(self, self.optimizer_class, lr=0.1, weight_decay=0.1, **options)


class Divided(Model):
    def configure_model(self):
        if not any(hasattr(p, "device_mesh") for p in self.parameters()):
            for layer in self.net:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


STRATEGIES = {
    "ddp": (Model, DDPStrategy),
    "fsdp2": (Divided, partial(ModelParallelStrategy, 2, 1)),
    "fsdp2 full": (Divided, partial(ModelParallelStrategy, 2, 1, save_distributed_checkpoint=False)),
}


def fit(strategy, optimizer_class, resume=None, save=None):
    """Train, and return the parameters after the last step, and the layers in 8 bits."""
    module_class, make_strategy = STRATEGIES[strategy]
    model = module_class(optimizer_class)

    def checkpoint(trainer, *_):
        if save is not None and trainer.global_step == RESUMED:
            trainer.save_checkpoint(save)

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=make_strategy(),
        max_steps=STEPS,
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=False,
        callbacks=[LambdaCallback(on_train_batch_end=checkpoint)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, ckpt_path=resume, weights_only=False)
    return values(model), in_eight_bits(trainer.optimizers[0], model)


def train(folder, strategy, name):
    """Train, and go on from the middle: in 8 bits, and where a checkpoint can, from one kind to the other."""
    seen = {}
    # A sharded checkpoint must hold all that is asked of it, and that of 32 bits has no min_8bit_size.
    kinds = {"8": PAIRS[name][0]} if strategy == "fsdp2" else dict(zip(("8", "32"), PAIRS[name], strict=True))
    for saved, saver in kinds.items():
        path = folder / f"{strategy} {name} {saved}.ckpt"
        seen[saved] = fit(strategy, saver, save=path)
        # Who resumes first must not read what others still write.
        dist.barrier()
        for loaded, loader in kinds.items():
            seen[f"{saved} to {loaded}"] = fit(strategy, loader, resume=path)
    return seen


def work(rank, folder, port):
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
    )
    torch.set_num_threads(1)
    folder = Path(folder)
    seen = {(strategy, name): train(folder, strategy, name) for strategy in STRATEGIES for name in PAIRS}
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    mp.spawn(work, (sys.argv[1], port), nprocs=2)
