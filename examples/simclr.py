"""Learn features of images without labels, with SimCLR's recipe for LARS, and evaluate them.

    python examples/simclr.py
    python examples/simclr.py --dataset digits --epochs 20

The network learns to match two random views of an image among the views of all images in the batch (Chen et
al. 2020, arXiv:2002.05709). Then a linear classifier, the probe, is trained with labels: on the learned
features, on the features of the untrained network, and on the pixels.
"""

import argparse
from pathlib import Path

import lightning
import rich
import torch
from images import FASHION_MNIST, batches, digits, fashion_mnist
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from lightning_lars import LargeBatchMixin, PreciseBatchNorm, TrustRatioMonitor, recipes


class SimCLR(LargeBatchMixin, lightning.LightningModule):
    """An encoder and a projection head, trained to find the other view of an image.

    Args:
        image_size: Height and width of the images.
        temperature: Temperature of the contrastive loss.
        **kwargs: Arguments of ``LargeBatchMixin``.
    """

    def __init__(self, image_size: int = 28, temperature: float = 0.5, **kwargs) -> None:
        super().__init__(**kwargs)
        self.temperature = temperature
        self.encoder = nn.Sequential(
            *convolution(1, 16, stride=image_size // 14 or 1),
            *convolution(16, 32, stride=2),
            *convolution(32, 128, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.projection = nn.Sequential(
            nn.Linear(128, 128, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Linear(128, 64, bias=False),
            nn.BatchNorm1d(64),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape ``(batch, 1, height, width)`` to features of shape ``(batch, 128)``."""
        return self.encoder(images)

    def precise_batch_norm_forward(self, batch: list[Tensor]) -> None:
        self.projection(self(batch[0]))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images = batch[0]
        views = torch.cat([random_view(images), random_view(images)])
        loss = contrastive_loss(self.projection(self.encoder(views)), self.temperature)
        self.log("loss", loss, prog_bar=True)
        return loss


def convolution(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
    convolve = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
    return [convolve, nn.BatchNorm2d(channels_out), nn.ReLU()]


def random_view(images: Tensor) -> Tensor:
    """Crop 30 to 100 % of each image, mirror half of them at random, and change contrast and brightness."""
    count = len(images)
    scale = torch.empty(count, device=images.device).uniform_(0.3, 1.0).sqrt()
    shift = (2 * torch.rand(count, 2, device=images.device) - 1) * (1 - scale)[:, None]
    mirror = torch.randint(0, 2, (count,), device=images.device) * 2 - 1
    zero = torch.zeros_like(scale)
    rows = [torch.stack([scale * mirror, zero, shift[:, 0]], 1), torch.stack([zero, scale, shift[:, 1]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    views = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast, brightness = torch.empty(2, count, 1, 1, 1, device=images.device).uniform_(-0.4, 0.4)
    return views * (1 + contrast) + 0.5 * brightness


def contrastive_loss(projected: Tensor, temperature: float) -> Tensor:
    """Return the NT-Xent loss: the cross-entropy of finding the other view of the same image.

    Args:
        projected: First views of all images, then their second views, of shape ``(2 * batch, size)``.
        temperature: Divisor of the cosine similarities, above 0.
    """
    directions = functional.normalize(projected, dim=1)
    similarity = directions @ directions.T / temperature
    count = len(projected)
    itself = torch.eye(count, dtype=torch.bool, device=projected.device)
    other = (torch.arange(count, device=projected.device) + count // 2) % count
    return functional.cross_entropy(similarity.masked_fill(itself, -torch.inf), other)


@torch.no_grad()
def features(model: SimCLR, data: TensorDataset) -> Tensor:
    """Return the features of all images, computed with the running statistics of the norms."""
    model.eval()
    found = torch.cat([model(images) for images, _ in batches(data, 1000, shuffle=False)])
    model.train()
    return found


def probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Return the test accuracy of a linear classifier, in percent."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    classifier.fit(train, train_labels)
    return 100 * float(classifier.score(test, test_labels))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="fashion-mnist")
    parser.add_argument(
        "--data-dir", type=Path, default=FASHION_MNIST, help="folder of the Fashion-MNIST files"
    )
    parser.add_argument("--epochs", type=int, default=30, help="the first 10 warm up")
    parser.add_argument("--batch-size", type=int, help="default: 512, or 128 for digits")
    parser.add_argument("--train-images", type=int, default=20480, help="to learn the features from")
    parser.add_argument(
        "--labels", type=int, nargs="+", default=[100, 1000, 10000], help="numbers of labels for the probe"
    )
    parser.add_argument(
        "--base-lr", type=float, default=1.0, help="at batch 256; SimCLR's is 1.0 for CIFAR-10"
    )
    parser.add_argument("--accelerator", default="auto", help="as for lightning.Trainer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    lightning.seed_everything(arguments.seed, verbose=False)
    small = arguments.dataset == "digits"
    train, test = digits() if small else fashion_mnist(arguments.data_dir)
    unlabeled = TensorDataset(train[: arguments.train_images][0])
    batch_size = arguments.batch_size or (128 if small else 512)
    recipe = recipes.simclr(batch_size, len(unlabeled) // batch_size, base_lr=arguments.base_lr)
    model = SimCLR(train[0][0].shape[-1], **recipe)

    def accuracies(of: SimCLR | None) -> list[float]:
        """Return the accuracies on features, or on pixels, for each number of labels."""
        known, new = (
            each.tensors[0].flatten(1) if of is None else features(of, each) for each in (train, test)
        )
        labels = train.tensors[1]
        return [probe(known[:count], labels[:count], new, test.tensors[1]) for count in arguments.labels]

    rows = {"the pixels": accuracies(None), "features before training": accuracies(model)}
    trainer = lightning.Trainer(
        accelerator=arguments.accelerator,
        devices=1,
        max_epochs=arguments.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        # Statistics for the probe: of uncropped images, and at the final weights.
        callbacks=[PreciseBatchNorm(16), TrustRatioMonitor(table=True)],
    )
    trainer.fit(model, batches(unlabeled, batch_size, shuffle=True))
    rows["features after training"] = accuracies(model.cpu())

    table = Table("Test accuracy of a linear probe of", *(f"{count:,} labels" for count in arguments.labels))
    for name, percents in rows.items():
        table.add_row(name, *(f"{percent:.1f} %" for percent in percents))
    rich.print(table)


if __name__ == "__main__":
    main()
