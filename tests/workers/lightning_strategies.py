"""Trains with Lightning's strategies, on one rank or several, and resumes."""

from functools import partial

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader

from lightning_lars import (
    LAMB,
    LARS,
    BatchSizeScaling,
    LargeBatchMixin,
    LearningRateWarmup,
    TrustRatioMonitor,
)
from tests.support.checkpoints import UNSAFELY
from tests.support.setups import Setup, parallelize
from tests.support.small_network import RESUMED, STEPS, Block, batches, floats, loss_of, network

BATCH_SIZE, BASE_BATCH_SIZE, WARMUP_STEPS = 8, 4, 4
# Overflows, and no longer after a few halvings.
INITIAL_SCALE = 2.0**17

OPTIMIZERS = {
    "LARS": partial(LARS, lr=0.1, trust_coefficient=0.1, weight_decay=0.1, nesterov=True, max_grad_norm=0.5),
    "LAMB": partial(LAMB, lr=0.05, weight_decay=0.1),
}


def over_shares(groups):
    """LAMB on those layers that ZeroRedundancyOptimizer gives to this process."""
    groups = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    return ZeroRedundancyOptimizer(groups, LAMB, lr=0.05, weight_decay=0.1)


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 without the GPU that Lightning asks for."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **self.kwargs
        )


class Module(LargeBatchMixin, LightningModule):
    """The network, trained on those samples that are this process's share."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net = network()

    def training_step(self, batch, batch_idx):
        # By number, as a run that is resumed begins its loader anew.
        share = batches()[batch_idx].to(batch).chunk(self.shares)[self.share]
        return loss_of(self.net(share))

    def train_dataloader(self):
        sampler = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {})
        self.shares, self.share = sampler.get("num_replicas", 1), sampler.get("rank", 0)
        samples = STEPS * BATCH_SIZE // self.shares
        return DataLoader(torch.zeros(samples, 5), batch_size=BATCH_SIZE // self.shares)


class Used(Module):
    """The network whose every trainable parameter gets a gradient, or torch loads no checkpoint in shards."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net.unused.requires_grad_(False)


class FSDP2(Used):
    def configure_model(self):
        if not any(hasattr(p, "device_mesh") for p in self.parameters()):
            self.divide()

    def divide(self):
        mesh = self.device_mesh["data_parallel"]
        for block in (self.net.one, self.net.two, self.net.unused):
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class TensorParallel(FSDP2):
    def divide(self):
        parallelize(self.net, self.device_mesh["tensor_parallel"])


class FSDP2TensorParallel(FSDP2):
    def divide(self):
        parallelize(self.net, self.device_mesh["tensor_parallel"])
        super().divide()


class Witness(Callback):
    """Notes what every step did."""

    def __init__(self):
        self.values, self.rates, self.scales = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        wrapped = trainer.strategy.model if isinstance(trainer.strategy, FSDPStrategy) else pl_module
        values = Setup(pl_module, wrapped, None, 0, 1).values()
        self.values.append({name.replace("_forward_module.", ""): p for name, p in values.items()})
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scales.append(scaler.get_scale() if scaler else None)


def overflowing():
    """Half precision whose first steps overflow."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=INITIAL_SCALE))


def ddp():
    return DDPStrategy(find_unused_parameters=True)


def fsdp():
    return CPUFSDPStrategy(auto_wrap_policy=ModuleWrapPolicy({Block}), state_dict_type="sharded")


def model_parallel(data, tensor, **options):
    return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor, **options)


FULL = {"save_distributed_checkpoint": False}
# Number of ranks, module, strategy and other arguments of the Trainer.
RUNS = {
    "ddp": (2, Module, ddp, {}),
    "zero": (2, Module, ddp, {}),
    "fsdp": (2, Module, fsdp, {}),
    "fsdp2": (2, FSDP2, partial(model_parallel, 2, 1), {}),
    "fsdp2 full": (2, FSDP2, partial(model_parallel, 2, 1, **FULL), {}),
    "tensor parallel": (2, TensorParallel, partial(model_parallel, 1, 2), {}),
    "fsdp2 tensor parallel": (4, FSDP2TensorParallel, partial(model_parallel, 2, 2), {}),
    "ddp 64-true": (2, Module, ddp, {"precision": "64-true"}),
    "ddp bf16-mixed": (2, Module, ddp, {"precision": "bf16-mixed"}),
    "ddp bf16-true": (2, Module, ddp, {"precision": "bf16-true"}),
    "ddp 16-mixed": (2, Module, ddp, {"plugins": overflowing}),
    "fsdp2 bf16-mixed": (2, FSDP2, partial(model_parallel, 2, 1), {"precision": "bf16-mixed"}),
    "fsdp2 bf16-true": (2, FSDP2, partial(model_parallel, 2, 1), {"precision": "bf16-true"}),
}


def fit(folder, module_class, optimizer, strategy, options, checkpoint=None, **more):
    """Train for five steps; return what happened."""
    options = {name: value() if callable(value) else value for name, value in options.items()}
    witness = Witness()
    monitored = optimizer is not over_shares
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy,
        max_steps=STEPS,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=CSVLogger(folder, name="logs", version=0) if monitored else False,
        callbacks=[
            witness,
            LearningRateWarmup(WARMUP_STEPS),
            BatchSizeScaling(BASE_BATCH_SIZE),
            *([TrustRatioMonitor()] if monitored else []),
            ModelCheckpoint(folder / "steps", filename="{step}", every_n_train_steps=RESUMED, save_top_k=-1),
        ],
        **options,
        **more,
    )
    trainer.fit(module_class(optimizer=optimizer), ckpt_path=checkpoint, **UNSAFELY)
    seen = {"values": witness.values, "rates": witness.rates, "scales": witness.scales}
    if monitored:
        seen["ratios"] = floats(trainer.optimizers[0].trust_ratios())
        seen["logged"] = floats(trainer.callback_metrics)
    return seen


def train(folder, name, of):
    """Train, and go on from the checkpoint of the third step, unless in half precision."""
    devices, module_class, strategy, options = RUNS[name]
    optimizer = over_shares if name == "zero" else OPTIMIZERS[of]
    folder = folder / f"{name} {of}"
    seen = fit(folder, module_class, optimizer, strategy(), options, devices=devices)
    # Who resumes first must not read what others still write.
    dist.barrier()
    if "16" not in name:
        checkpoint = folder / "steps" / f"step={RESUMED}.ckpt"
        arguments = folder / "again", module_class, optimizer, strategy(), options, checkpoint
        seen["resumed"] = fit(*arguments, devices=devices)["values"]
    return seen
