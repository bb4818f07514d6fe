"""Draw the plots of docs/trust_ratios.md: a healthy run on Fashion-MNIST, and unhealthy ones.

python docs/plot_trust_ratios.py

Takes two minutes on a CPU. Prints, for each, the warnings and the table of TrustRatioMonitor, and the test
accuracy. The images come from ``apt-get install dataset-fashion-mnist``, or from ``--data-dir``.
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path

import lightning
from rich import print as show
from torch.utils.data import DataLoader

from lightning_lars import LARS, TrustRatioMonitor, WarmupDecayLR

DOCS = Path(__file__).resolve().parent
sys.path.append(str(DOCS.parent / "examples"))

from classifiers import MixinClassifier  # noqa: E402
from images import FASHION_MNIST, digits, fashion_mnist  # noqa: E402

LEARNING_RATES = {"healthy": 6.0, "learning_rate_of_sgd": 0.1, "learning_rate_too_large": 300.0}


def main() -> None:
    """Draw every case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="fashion-mnist")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="of the Fashion-MNIST files")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=DOCS, help="for the pictures")
    arguments = parser.parse_args()

    small = arguments.dataset == "digits"
    train, test = digits() if small else fashion_mnist(arguments.data_dir)
    batch_size = 128 if small else 1024
    for name in arguments.cases:
        lightning.seed_everything(0, verbose=False)
        model = MixinClassifier(
            image_size=train[0][0].shape[-1],
            optimizer=partial(LARS, lr=LEARNING_RATES[name], weight_decay=5e-4),
            lr_scheduler=partial(
                WarmupDecayLR, warmup_steps=arguments.epochs * (len(train) // batch_size) // 10
            ),
        )
        picture = arguments.folder.resolve() / f"trust_ratios_{name}.png"
        monitor = TrustRatioMonitor(picture=picture, table=True)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=arguments.epochs,
            logger=False,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[monitor],
        )
        show(f"[bold]{name}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(model, DataLoader(train, batch_size, shuffle=True, drop_last=True))
            trainer.test(model, DataLoader(test, 500), verbose=False)
        for warning in caught:
            if Path(warning.filename).stem == "trust_ratio_monitor":
                show(f"Warned: {warning.message}")
        show(f"Test accuracy: {trainer.callback_metrics['test accuracy']:.2%}")


if __name__ == "__main__":
    main()
