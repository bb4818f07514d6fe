"""Large batches on a GPU: ResNet-20 on Fashion-MNIST, and a transformer on the sources of Python.

    python examples/gpu_recipe.py --data-dir FOLDER
    python examples/gpu_recipe.py --only text           # one of the two parts
    python examples/gpu_recipe.py --toy                # tiny, to see on a CPU that all of it runs

Nothing is downloaded. Learning rates are those of a small batch size, transferred by rule
(`BatchSizeScaling`), with a warmup (`LearningRateWarmup`) and cosine decay. Prints and saves each result as
soon as it is known, draws a table and a plot for each part, and starts no run after eight minutes
(`--seconds`), half of them for each part. docs/gpu_recipe.md says what has been measured.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import rich
import torch
from byte_transformer import ByteTransformer, standard_library
from images import FASHION_MNIST, batches, digits, fashion_mnist
from recipe_report import Row, report, save
from resnet20 import ImageClassifier, resnet20
from study_training import be_quiet
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from lightning_lars import (
    LAMB,
    LARS,
    BatchSizeScaling,
    LearningRateWarmup,
    PreciseBatchNorm,
    WarmupDecayLR,
)


class Optimizer(NamedTuple):
    """An optimizer with its learning rate at a base batch size, and the rule that scales it to others."""

    build: Callable[..., torch.optim.Optimizer]
    rule: str
    excluded_lr_scale: float = 1.0


IMAGES = {
    "Nesterov SGD": Optimizer(partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4), "linear"),
    "AdamW": Optimizer(partial(AdamW, lr=2e-3, weight_decay=0.05), "sqrt"),
    "LARS": Optimizer(partial(LARS, lr=8.0, weight_decay=5e-4), "sqrt", 0.01),
    "LAMB": Optimizer(partial(LAMB, lr=1e-2, weight_decay=0.05), "sqrt"),
}
TEXT = {
    "AdamW": Optimizer(partial(AdamW, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1), "sqrt"),
    "LAMB": Optimizer(partial(LAMB, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1), "sqrt"),
}


class Size(NamedTuple):
    """The sizes of networks, batches and runs."""

    width: int
    epochs: int
    image_batches: tuple[int, ...]
    text_width: int
    text_layers: int
    text_length: int
    text_batches: tuple[int, ...]
    stretches: int
    """Number of text sequences in a run."""


FULL = Size(16, 6, (128, 1024, 4096, 15000), 384, 6, 256, (64, 256, 1024), 128_000)
TOY = Size(4, 2, (64, 512), 64, 1, 32, (16, 64), 256)


def train_images(data_dir: Path | None, size: Size, seeds: int) -> Iterator[Row]:
    """Train with SGD at the small batch size, with every optimizer at larger ones, and test each run."""
    train, test = digits() if data_dir is None else fashion_mnist(data_dir)
    small, *large = size.image_batches
    runs = [(small, "Nesterov SGD"), *itertools.product(large, IMAGES)]
    for number, (seed, (batch_size, name)) in enumerate(itertools.product(range(seeds), runs), 1):
        announce("Images", number, seeds * len(runs), name, batch_size, seed)
        lightning.seed_everything(seed, verbose=False)
        steps = len(train) // batch_size * size.epochs
        model = ImageClassifier(resnet20(size.width), train, test, **arguments_of(IMAGES[name], steps))
        loaders = (
            batches(TensorDataset(torch.arange(len(train))), batch_size, shuffle=True),
            batches(TensorDataset(torch.arange(len(test))), 1000, shuffle=False),
        )
        callbacks = [PreciseBatchNorm(max(1, 8192 // batch_size))]
        trainer = trainer_of(IMAGES[name], size.epochs, steps, small, batch_size, callbacks)
        result = train_one(trainer, model, *loaders)
        yield {"optimizer": name, "batch": batch_size, "seed": seed, **result}


def train_text(size: Size, seeds: int) -> Iterator[Row]:
    """Train on the same amount of text with every optimizer, in small and large batches, and test each."""
    train, held_out = standard_library(limit=2**16 if size is TOY else None)
    small = size.text_batches[0]
    runs = list(itertools.product(size.text_batches, TEXT))
    for number, (seed, (batch_size, name)) in enumerate(itertools.product(range(seeds), runs), 1):
        announce("Text", number, seeds * len(runs), name, batch_size, seed)
        lightning.seed_everything(seed, verbose=False)
        steps = size.stretches // batch_size
        model = ByteTransformer(
            train,
            held_out,
            size.text_length,
            size.text_width,
            size.text_layers,
            **arguments_of(TEXT[name], steps),
        )
        starts = torch.randint(len(train) - size.text_length, (size.stretches,))
        every = torch.arange(0, len(held_out) - size.text_length, size.text_length)
        loaders = (
            batches(TensorDataset(starts), batch_size, shuffle=True),
            batches(TensorDataset(every[:4096]), 256, shuffle=False),
        )
        result = train_one(trainer_of(TEXT[name], 1, steps, small, batch_size, []), model, *loaders)
        yield {"optimizer": name, "batch": batch_size, "seed": seed, **result}


def announce(part: str, number: int, total: int, name: str, batch_size: int, seed: int) -> None:
    """Print which run comes next, above the progress bar of its Trainer."""
    rich.print(f"{part}, {number} of {total}: {name}, batch {batch_size:,}, seed {seed}")


def train_part(title: str, rows: Iterator[Row], folder: Path, seconds: float) -> None:
    """Train the runs of a part until the time is up, and report each as soon as it is done."""
    end = time.monotonic() + seconds
    done: list[Row] = []
    while (in_time := time.monotonic() < end) and (row := next(rows, None)) is not None:
        done.append(row)
        rich.print(", ".join(f"{key}={value:.4g}" for key, value in row.items() if isinstance(value, float)))
        save(title, done, folder)
    if not in_time:
        rich.print(f"{title}: the time is up after {len(done)} run{'s' * (len(done) != 1)} (--seconds)")
    if done:
        report(title, done, folder)


def arguments_of(optimizer: Optimizer, steps: int) -> dict[str, Any]:
    """Return the arguments of ``LargeBatchMixin``."""
    return {
        "optimizer": optimizer.build,
        "lr_scheduler": partial(WarmupDecayLR, warmup_steps=0, total_steps=steps),
        "excluded_lr_scale": optimizer.excluded_lr_scale,
    }


def trainer_of(
    optimizer: Optimizer,
    epochs: int,
    steps: int,
    base_batch_size: int,
    batch_size: int,
    callbacks: list[lightning.Callback],
) -> lightning.Trainer:
    """Return a Trainer that scales the rate from the base batch size to this one, and warms up."""
    return lightning.Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        benchmark=True,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[
            BatchSizeScaling(base_batch_size, rule=optimizer.rule, batch_size=batch_size),
            LearningRateWarmup(warmup_steps=max(1, steps // 10)),
            *callbacks,
        ],
    )


def train_one(
    trainer: lightning.Trainer, model: lightning.LightningModule, train: DataLoader, test: DataLoader
) -> Row:
    """Train, test, and return the results."""
    started = time.perf_counter()
    trainer.fit(model, train)
    seconds = time.perf_counter() - started
    (result,) = trainer.test(model, test, verbose=False)
    return {"steps": trainer.global_step, "seconds": seconds, **result}


def positive(text: str) -> int:
    """Read an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {number}")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", type=Path, default=FASHION_MNIST, help="folder of the Fashion-MNIST files"
    )
    parser.add_argument("--toy", action="store_true", help="tiny networks, on scikit-learn's digits")
    parser.add_argument("--seeds", type=positive, default=1, help="repetitions of each run")
    parser.add_argument(
        "--only", nargs="+", choices=["images", "text"], default=["images", "text"], help="parts to train"
    )
    parser.add_argument("--seconds", type=positive, default=480, help="start no run after this time")
    parser.add_argument("--output-dir", type=Path, default=Path("gpu_recipe"), help="for CSV and PNG")
    arguments = parser.parse_args()
    be_quiet()
    size = TOY if arguments.toy else FULL
    data_dir = None if arguments.toy else arguments.data_dir
    seconds = arguments.seconds / len(set(arguments.only))
    if "images" in arguments.only:
        images = train_images(data_dir, size, arguments.seeds)
        train_part("Images by a ResNet-20", images, arguments.output_dir, seconds)
    if "text" in arguments.only:
        train_part("Text by a transformer", train_text(size, arguments.seeds), arguments.output_dir, seconds)


if __name__ == "__main__":
    main()
