"""Does a batch that grows do what a rate that decays does, in fewer steps?

    python examples/growing_batch.py --seeds 3

Trains the CNN of the large-batch study on Fashion-MNIST with clipped SGD, as the study tuned it at batch 128.
After a half and three quarters of the samples, either the learning rate is divided by 4, or the batch size is
multiplied by 4 (Smith et al. 2018), or neither. Each sees the same number of samples.
"""

import argparse
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import lightning
import rich
import torch
from images import FASHION_MNIST, batches
from rich.table import Table
from study_training import PRECISE_SAMPLES, Classifier, Data, Watch, be_quiet, load, network

from lightning_lars import BatchSizeSchedule, PreciseBatchNorm, WarmupDecayLR

BATCH_SIZE, FACTOR = 128, 4
SGD = partial(torch.optim.SGD, lr=0.4, momentum=0.9, weight_decay=5e-4)
EXCLUDED_LR, CLIP = 0.05, 1.0
FIRST_SEED = 11
VALIDATION_IMAGES = 100
WAYS = ("neither", "the rate decays", "the batch grows")


def train(way: str, seed: int, epochs: int, data: Data) -> tuple[int, float, float]:
    """Return the steps of a run, its final training loss, and its test accuracy in percent."""
    lightning.seed_everything(seed, verbose=False)
    steps = epochs * (len(data.train) // BATCH_SIZE)
    changes = [steps // 2, steps * 3 // 4]
    schedule = {"decay": "constant"}
    watch = Watch()
    callbacks = [watch, PreciseBatchNorm(PRECISE_SAMPLES // BATCH_SIZE)]
    if way == "the rate decays":
        schedule = {"decay": "step", "milestones": changes, "gamma": 1 / FACTOR}
    if way == "the batch grows":
        sizes = {BATCH_SIZE * step: BATCH_SIZE * FACTOR ** (n + 1) for n, step in enumerate(changes)}
        callbacks.append(BatchSizeSchedule({0: BATCH_SIZE, **sizes}, unit="samples", batch_size=BATCH_SIZE))
    classifier = Classifier(
        network("cnn", data.train[0][0].shape[-1]),
        optimizer=SGD,
        lr_scheduler=partial(WarmupDecayLR, warmup_steps=max(1, steps // 10), **schedule),
        excluded_lr=EXCLUDED_LR,
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        gradient_clip_val=CLIP,
        # PreciseBatchNorm computes running statistics before a validation.
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(classifier, batches(data.train, BATCH_SIZE, True), batches(data.validation, 1000, False))
    trainer.test(classifier, batches(data.test, 1000, False), verbose=False)
    return trainer.global_step, watch.train_loss, 100 * trainer.callback_metrics["test"].item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="fashion-mnist")
    parser.add_argument(
        "--data-dir", type=Path, default=FASHION_MNIST, help="folder of the Fashion-MNIST files"
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--train-images", type=int, default=20480)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    be_quiet()
    torch.set_num_threads(1)
    data_dir = arguments.data_dir if arguments.dataset == "fashion-mnist" else None
    data = load(data_dir, arguments.train_images, VALIDATION_IMAGES)
    table = Table("After 1/2 and 3/4 of the samples", "Steps", "Train loss", "Test %", title="SGD, clipped")
    for way in WAYS:
        seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
        steps, losses, accuracies = zip(
            *(train(way, seed, arguments.epochs, data) for seed in seeds), strict=True
        )
        spread = f" ± {stdev(accuracies):.2f}" if len(seeds) > 1 else ""
        table.add_row(way, f"{steps[0]:,}", f"{mean(losses):.3f}", f"{mean(accuracies):.2f}{spread}")
    rich.print(table)


if __name__ == "__main__":
    main()
