"""What advise says of the large-batch study's network, at the beginning of a run and from its checkpoints.

    python examples/advice_check.py

Uses Fashion-MNIST, from the folder --data-dir, with the hyperparameters that the study tuned at batch 128.
Prints a table of critical batch sizes, which docs/advice.md compares with what the study measured.
"""

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning
import rich
from images import FASHION_MNIST, batches
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.table import Table
from study_training import DECAYS, OPTIMIZERS, Choice, Classifier, be_quiet, load, network

from lightning_lars import WarmupDecayLR, advise
from lightning_lars.advice.report import Advice

CHOICES = [
    Choice("SGD", 0.4, weight_decay=5e-4, excluded_lr=0.05, clip=1.0),
    Choice("AdamW", 0.008, weight_decay=0.01, excluded_lr=0.002, clip=1.0),
    Choice("LARS", 11.3, weight_decay=5e-4, excluded_lr=0.05),
    Choice("LAMB", 0.028, weight_decay=0.01, excluded_lr=0.005, clip=1.0),
]
TRAIN_IMAGES = 20480


def classifier(choice: Choice, image_size: int, warmup_steps: int) -> Classifier:
    """Return the study's CNN, with an optimizer as the study tuned it."""
    optimizer = partial(OPTIMIZERS[choice.optimizer], lr=choice.lr, weight_decay=choice.weight_decay)
    schedule = partial(WarmupDecayLR, warmup_steps=warmup_steps, **DECAYS[choice.decay])
    net = network("cnn", image_size)
    return Classifier(net, optimizer=optimizer, lr_scheduler=schedule, excluded_lr=choice.excluded_lr)


def cell(advice: Advice) -> str:
    """Return the critical batch size with its error, and the batch size that is suggested."""
    critical = advice.critical
    if critical is None or critical.b_simple is None:
        return "unknown"
    return (
        f"{critical.b_simple:,.0f} ± {critical.standard_error or 0:,.0f}, try {advice.suggested_batch_size}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--max-steps", type=int, default=300, help="steps of every measurement")
    parser.add_argument("--after", type=int, nargs="*", default=[5, 10, 15], help="epochs to measure after")
    parser.add_argument("--optimizers", nargs="+", default=[each.optimizer for each in CHOICES])
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="fashion-mnist")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST")
    arguments = parser.parse_args()
    be_quiet()
    is_digits = arguments.dataset == "digits"
    data = load(None, 1024, 256) if is_digits else load(arguments.data_dir, TRAIN_IMAGES, 20000)
    loader = batches(data.train, arguments.batch_size, shuffle=True)
    warmup_steps = max(1, arguments.epochs * len(loader) // 10)
    table = Table(title=f"Critical batch size, from {arguments.max_steps} steps")
    for heading in (
        "Optimizer",
        "At the beginning",
        *(f"After {epoch} epoch{'s' * (epoch != 1)}" for epoch in arguments.after),
    ):
        table.add_column(heading)
    for choice in (each for each in CHOICES if each.optimizer in arguments.optimizers):
        choice = replace(choice, batch_size=arguments.batch_size)
        model = partial(classifier, choice, data.train[0][0].shape[-1], warmup_steps)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = partial(
            lightning.Trainer,
            accelerator="cpu",
            devices=1,
            max_epochs=arguments.epochs,
            gradient_clip_val=choice.clip,
            **quiet,
        )
        lightning.seed_everything(arguments.seed, verbose=False)
        cells = [cell(advise(model(), loader, trainer=trainer(), max_steps=arguments.max_steps))]
        with tempfile.TemporaryDirectory() as folder:
            keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
            if arguments.after:
                lightning.seed_everything(arguments.seed, verbose=False)
                trainer(callbacks=[keep]).fit(model(), loader)
            for epoch in arguments.after:
                advice = advise(
                    model(),
                    loader,
                    trainer=trainer(),
                    max_steps=arguments.max_steps,
                    ckpt_path=f"{folder}/epoch={epoch - 1}.ckpt",
                )
                cells.append(cell(advice))
        table.add_row(choice.optimizer, *cells)
    rich.print(table)


if __name__ == "__main__":
    main()
