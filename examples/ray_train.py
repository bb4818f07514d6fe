"""Train a small CNN on digits with LARS under Ray Train, on several workers, which may die and come back.

    pip install 'ray[train]'
    python examples/ray_train.py
    python examples/ray_train.py --kill-in-epoch 1

Module and callbacks are those of any Trainer. Ray Train brings its own strategy, environment, and a callback
that reports to it after every epoch: new workers resume from the checkpoint of the last report it received.
"""

import argparse
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import ray
import torch
from classifiers import MixinClassifier
from images import digits
from lightning.pytorch.loggers import CSVLogger
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    get_all_reported_checkpoints,
    get_checkpoint,
)
from ray.train.lightning import (
    RayDDPStrategy,
    RayLightningEnvironment,
    RayTrainReportCallback,
    prepare_trainer,
)
from ray.train.torch import TorchTrainer
from torch.utils.data import DataLoader, Dataset

from lightning_lars import LARS, BatchSizeScaling, LearningRateWarmup, TrustRatioMonitor


class DiesOnce(lightning.Callback):
    """Kills the process of the last worker within an epoch, as a host that is switched off would.

    Args:
        epoch: When.
        marker: A file that exists from then on.
    """

    def __init__(self, epoch: int, marker: Path) -> None:
        self.epoch = epoch
        self.marker = marker

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        is_last = trainer.global_rank == trainer.world_size - 1
        if is_last and (trainer.current_epoch, batch_idx) == (self.epoch, 2) and not self.marker.exists():
            # Ray Train asks for reports every two seconds, and forgets those of a worker that dies before.
            get_all_reported_checkpoints()
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def fit(module: lightning.LightningModule, data: Dataset[Any], options: dict[str, Any]) -> None:
    """Fit a module on this worker, and save what was trained."""
    folder = Path(options["folder"])
    callbacks = [
        BatchSizeScaling(base_batch_size=64, rule="sqrt"),
        LearningRateWarmup(warmup_steps=5),
        TrustRatioMonitor(layers="*"),
    ]
    if options["kill_in_epoch"] is not None:
        callbacks.append(DiesOnce(options["kill_in_epoch"], folder / "killed"))
    trainer = lightning.Trainer(
        accelerator="auto",
        devices="auto",
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        max_epochs=options["epochs"],
        accumulate_grad_batches=options["accumulate"],
        # Without a version, so that workers that resume keep the log of those before them.
        logger=CSVLogger(folder, name="logs"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        # The last one, as it saves the state of the others.
        callbacks=[*callbacks, RayTrainReportCallback()],
    )
    trainer = prepare_trainer(trainer)
    loader = DataLoader(data, 64, shuffle=True, drop_last=True)
    reported = get_checkpoint()
    if reported is None:
        trainer.fit(module, loader)
    else:
        with reported.as_directory() as checkpoint:
            trainer.fit(module, loader, ckpt_path=Path(checkpoint) / RayTrainReportCallback.CHECKPOINT_NAME)
    trainer.save_checkpoint(folder / "trained.ckpt")


def train(options: dict[str, Any]) -> None:
    """Train on this worker."""
    lightning.seed_everything(0)
    data, _ = digits()
    lars = partial(LARS, lr=4.0, weight_decay=5e-4)
    size = data[0][0].shape[-1]
    fit(MixinClassifier(image_size=size, optimizer=lars, excluded_lr=0.05), data, options)


def run(train: Callable[[dict[str, Any]], None], options: dict[str, Any], workers: int) -> Result:
    """Train on all workers, starting them again, up to twice, where one of them dies."""
    trainer = TorchTrainer(
        train,
        train_loop_config=options,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(
            name="run",
            storage_path=options["folder"],
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    return trainer.fit()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1, help="batches for each step")
    parser.add_argument("--folder", type=Path, default=Path("ray_results"), help="for logs and checkpoints")
    parser.add_argument("--kill-in-epoch", type=int, help="kill the last worker in this epoch, once")
    arguments = parser.parse_args()
    options = {**vars(arguments), "folder": str(arguments.folder.resolve())}
    # One more than there are workers, for Ray Train itself. They share the cores that the machine has.
    ray.init(num_cpus=arguments.workers + 1, include_dashboard=False)
    result = run(train, options, options.pop("workers"))
    ray.shutdown()
    print(f"Last report: {result.metrics}")


if __name__ == "__main__":
    main()
