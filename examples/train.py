"""Train a small CNN on real images with LARS, LAMB, SGD or AdamW.

    python examples/train.py
    python examples/train.py --dataset fashion-mnist --optimizer lamb --batch-size 1024

Prints which layers are adapted and excluded, logs the trust ratio of every adapted layer, and ends with
the accuracy on test images.
"""

import argparse
import gzip
from functools import partial
from pathlib import Path

import lightning
import numpy
import rich
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lars import LAMB, LARS, LargeBatchMixin, TrustRatioMonitor, explain_param_groups

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it

OPTIMIZERS = {
    "lars": partial(LARS, lr=3.0, weight_decay=5e-4),
    "lamb": partial(LAMB, lr=0.02, weight_decay=0.01),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.01),
}


class Classifier(LargeBatchMixin, lightning.LightningModule):
    """Three convolutions with batch norm, and a linear head."""

    def __init__(self, image_size: int, width: int = 16, classes: int = 10, **kwargs) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *convolution(1, width, stride=image_size // 8),
            *convolution(width, 2 * width, stride=2),
            *convolution(2 * width, 4 * width, stride=1),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * width, classes),
        )
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("test accuracy", self.accuracy)


def convolution(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
    """A convolution that leaves the shift to the norm behind it."""
    return [
        nn.Conv2d(channels_in, channels_out, 5, stride, padding=2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]


def digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, every fifth for testing."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3
    labels = torch.tensor(data.target)
    test = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~test], labels[~test]), TensorDataset(images[test], labels[test])


def fashion_mnist(data_dir: Path) -> tuple[TensorDataset, TensorDataset]:
    """The 60,000 and 10,000 images of 28 x 28 pixels."""

    def read(name: str, header: int) -> Tensor:
        path = data_dir / name
        if not path.exists():
            raise SystemExit(
                f"{path} is missing. Install the images with\n\n    apt-get install dataset-fashion-mnist\n\n"
                "or name the folder that holds them with --data-dir."
            )
        with gzip.open(path) as file:
            return torch.from_numpy(numpy.frombuffer(file.read(), numpy.uint8, offset=header).copy())

    def split(prefix: str) -> TensorDataset:
        images = read(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
        return TensorDataset(images / 255 - 0.3, read(f"{prefix}-labels-idx1-ubyte.gz", 8).long())

    return split("train"), split("t10k")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="of the Fashion-MNIST files")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="lars")
    parser.add_argument("--lr", type=float, help="learning rate (default: one that suits the optimizer)")
    parser.add_argument("--batch-size", type=int, help="per device (default: 128, or 1024 for fashion-mnist)")
    parser.add_argument("--epochs", type=int, help="default: 15, or 3 for fashion-mnist")
    parser.add_argument("--accelerator", default="auto", help="as for lightning.Trainer")
    parser.add_argument("--devices", default="auto", help="as for lightning.Trainer")
    parser.add_argument("--strategy", default="auto", help="as for lightning.Trainer")
    parser.add_argument("--precision", default="32-true", help="as for lightning.Trainer")
    parser.add_argument("--log-dir", type=Path, default=Path("logs"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    lightning.seed_everything(arguments.seed)
    small = arguments.dataset == "digits"
    train, test = digits() if small else fashion_mnist(arguments.data_dir)
    batch_size = arguments.batch_size or (128 if small else 1024)
    optimizer = OPTIMIZERS[arguments.optimizer]
    if arguments.lr is not None:
        optimizer = partial(optimizer, lr=arguments.lr)
    model = Classifier(image_size=train[0][0].shape[-1], optimizer=optimizer)
    logger = CSVLogger(arguments.log_dir, name=f"{arguments.dataset}-{arguments.optimizer}")
    has_trust_ratios = arguments.optimizer in ("lars", "lamb")
    trainer = lightning.Trainer(
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        strategy=arguments.strategy,
        precision=arguments.precision,
        max_epochs=arguments.epochs or (15 if small else 3),
        logger=logger,
        log_every_n_steps=5,
        callbacks=[TrustRatioMonitor()] if has_trust_ratios else [],
    )
    if trainer.is_global_zero:
        rich.print(explain_param_groups(model))
    trainer.fit(model, DataLoader(train, batch_size, shuffle=True, drop_last=True))
    trainer.test(model, DataLoader(test, 500), verbose=False)
    if trainer.is_global_zero:
        rich.print(f"Log: {logger.log_dir}/metrics.csv")
        rich.print(f"Test accuracy: {trainer.callback_metrics['test accuracy']:.2%} of {len(test):,} images")


if __name__ == "__main__":
    main()
