"""Trains with 8-bit state in Trainers on two ranks, and resumes."""

from functools import partial

import lightning
import torch.distributed as dist
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit, build_optimizer
from tests.support.checkpoints import UNSAFELY
from tests.workers.eight_bit import RESUMED, STEPS, batches, in_eight_bits, network, values

PAIRS = {"LARS": {8: LARS8bit, 32: LARS}, "LAMB": {8: LAMB8bit, 32: LAMB}}


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
    trainer.fit(model, ckpt_path=resume, **UNSAFELY)
    return values(model), in_eight_bits(trainer.optimizers[0], model)


def train(folder, strategy, name, saved, loaded):
    """Train with state of 8 or 32 bits, and go on from the middle with each of some kinds of state."""
    path = folder / f"{strategy} {name} {saved}.ckpt"
    straight = fit(strategy, PAIRS[name][saved], save=path)
    # Who resumes first must not read what others still write.
    dist.barrier()
    return straight, {each: fit(strategy, PAIRS[name][each], resume=path) for each in loaded}
