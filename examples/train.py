"""Train a small CNN on real images with LARS, LAMB, SGD or AdamW.

    python examples/train.py
    python examples/train.py --dataset fashion-mnist --optimizer lamb --batch-size 1024

Warms up and decays the learning rate, prints which layers are adapted and excluded, logs the trust ratio of
every adapted layer, and ends with the accuracy on test images. On several hosts: examples/multi_node.
"""

import argparse
from datetime import timedelta
from functools import partial
from pathlib import Path

import lightning
import rich
import torch
from classifiers import MixinClassifier, ShardedClassifier
from images import FASHION_MNIST, digits, fashion_mnist
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader

from lightning_lars import TrustRatioMonitor, WarmupDecayLR, explain_param_groups, recipes

STARTING_POINTS = {"lars": recipes.lars, "lamb": recipes.lamb}
OTHERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.01),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="of the Fashion-MNIST files")
    parser.add_argument("--optimizer", choices=[*STARTING_POINTS, *OTHERS], default="lars")
    parser.add_argument("--lr", type=float, help="learning rate (default: one that suits the optimizer)")
    parser.add_argument(
        "--batch-size", type=positive, help="per device (default: 128, or 1024 for fashion-mnist)"
    )
    parser.add_argument("--epochs", type=positive, help="default: 15, or 3 for fashion-mnist")
    parser.add_argument("--accelerator", default="auto", help="as for lightning.Trainer")
    parser.add_argument("--devices", default="auto", help="as for lightning.Trainer")
    parser.add_argument("--num-nodes", type=int, default=1, help="hosts, as for lightning.Trainer")
    parser.add_argument("--strategy", default="auto", help="as for lightning.Trainer, or fsdp2")
    parser.add_argument("--timeout", type=float, default=30, help="minutes to wait for others: ddp and fsdp2")
    parser.add_argument("--precision", default="32-true", help="as for lightning.Trainer")
    parser.add_argument("--norm", choices=["batch", "group"], default="batch", help="batch: per device")
    parser.add_argument("--log-dir", type=Path, default=Path("logs"))
    parser.add_argument(
        "--checkpoint-dir", type=Path, help="save there after every epoch, and resume from the last one there"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    lightning.seed_everything(arguments.seed)
    small = arguments.dataset == "digits"
    train, test = digits() if small else fashion_mnist(arguments.data_dir)
    batch_size = arguments.batch_size or (128 if small else 1024)
    epochs = arguments.epochs or (15 if small else 3)
    has_trust_ratios = arguments.optimizer in STARTING_POINTS
    logger = CSVLogger(arguments.log_dir, name=f"{arguments.dataset}-{arguments.optimizer}")
    callbacks = [LearningRateMonitor()]
    if has_trust_ratios:
        callbacks.append(TrustRatioMonitor(layers="*"))
    last = None
    if arguments.checkpoint_dir is not None:
        last = arguments.checkpoint_dir / "last.ckpt"
        callbacks += [every_epoch(arguments.checkpoint_dir), SharedFolder(last)]
    trainer = lightning.Trainer(
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        num_nodes=arguments.num_nodes,
        strategy=strategy_of(arguments),
        precision=arguments.precision,
        max_epochs=epochs,
        logger=logger,
        log_every_n_steps=5,
        callbacks=callbacks,
    )
    on_all_devices = batch_size * trainer.world_size
    if on_all_devices > len(train):
        largest = len(train) // trainer.world_size
        parser.error(
            f"argument --batch-size: must be at most {largest} for {len(train):,} images, got {batch_size}"
        )
    warmup_steps = epochs * (len(train) // on_all_devices) // 10
    if has_trust_ratios:
        options = STARTING_POINTS[arguments.optimizer](on_all_devices, warmup_steps)
    else:
        scheduler = partial(WarmupDecayLR, warmup_steps=warmup_steps)
        options = {"optimizer": OTHERS[arguments.optimizer], "lr_scheduler": scheduler}
    if arguments.lr is not None:
        options["optimizer"] = partial(options["optimizer"], lr=arguments.lr)
    module = ShardedClassifier if arguments.strategy == "fsdp2" else MixinClassifier
    model = module(image_size=train[0][0].shape[-1], norm=arguments.norm, **options)
    if trainer.is_global_zero:
        rich.print(explain_param_groups(model))
    loader = DataLoader(train, batch_size, shuffle=True, drop_last=True)
    trainer.fit(model, loader, ckpt_path=last if last is not None and last.exists() else None)
    trainer.test(model, DataLoader(test, 500), verbose=False)
    if trainer.is_global_zero:
        rich.print(f"Log: {logger.log_dir}/metrics.csv")
        rich.print(f"Test accuracy: {trainer.callback_metrics['test accuracy']:.2%} of {len(test):,} images")


def positive(text: str) -> int:
    """Read an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def strategy_of(arguments: argparse.Namespace) -> str | DDPStrategy | ModelParallelStrategy:
    """Return the strategy that the arguments name."""
    timeout = timedelta(minutes=arguments.timeout)
    if arguments.strategy == "fsdp2":
        devices = torch.cuda.device_count() or 1 if arguments.devices == "auto" else int(arguments.devices)
        return ModelParallelStrategy(arguments.num_nodes * devices, tensor_parallel_size=1, timeout=timeout)
    return DDPStrategy(timeout=timeout) if arguments.strategy == "ddp" else arguments.strategy


def every_epoch(folder: Path) -> ModelCheckpoint:
    """Save after every epoch, and link ``last.ckpt`` to the last checkpoint that is whole."""
    name = {"filename": "{epoch}", "enable_version_counter": False}
    return ModelCheckpoint(folder, save_top_k=-1, save_last="link", **name)


class SharedFolder(lightning.Callback):
    """Raise on all ranks if some find a checkpoint to resume from, and others do not."""

    def __init__(self, last: Path) -> None:
        self.last, self.is_found = last, last.exists()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        by_all, by_any = (
            trainer.strategy.reduce_boolean_decision(self.is_found, all=of) for of in (True, False)
        )
        if by_any and not by_all:
            raise RuntimeError(
                f"all hosts must share --checkpoint-dir, but {self.last} is on some of them only"
            )


if __name__ == "__main__":
    # torchrun then reports the error of the rank that failed first.
    record(main)()
