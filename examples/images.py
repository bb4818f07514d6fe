"""Data sets and a small network, shared by the examples."""

import gzip
from pathlib import Path

import lightning
import numpy
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, every fifth for testing."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3
    labels = torch.tensor(data.target)
    test = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~test], labels[~test]), TensorDataset(images[test], labels[test])


def fashion_mnist(data_dir: Path) -> tuple[TensorDataset, TensorDataset]:
    """Return the 60,000 training and 10,000 test images of 28 x 28 pixels."""

    def read(name: str, header: int) -> Tensor:
        path = data_dir / name
        if not path.exists():
            raise SystemExit(
                f"{path} is missing. Install the images with\n\n    apt-get install dataset-fashion-mnist\n\n"
                "or pass the folder that contains them as --data-dir."
            )
        with gzip.open(path) as file:
            return torch.from_numpy(numpy.frombuffer(file.read(), numpy.uint8, offset=header).copy())

    def split(prefix: str) -> TensorDataset:
        images = read(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
        return TensorDataset(images / 255 - 0.3, read(f"{prefix}-labels-idx1-ubyte.gz", 8).long())

    return split("train"), split("t10k")


def batches(data: TensorDataset, batch_size: int, shuffle: bool) -> DataLoader:
    """Return a loader that indexes the tensors once per batch instead of once per image."""
    sampler = RandomSampler(data) if shuffle else SequentialSampler(data)
    return DataLoader(data, batch_size=None, sampler=BatchSampler(sampler, batch_size, drop_last=shuffle))


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a norm of every image by itself, in groups of eight channels."""
    return nn.GroupNorm(channels // 8, channels)


NORMS = {"batch": nn.BatchNorm2d, "group": group_norm}


def network(image_size: int, width: int = 16, classes: int = 10, norm: str = "batch") -> nn.Sequential:
    """Return a network of three convolutions with norms, and a linear head."""

    def convolution(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
        # Without a bias, because the norm that follows has one.
        convolve = nn.Conv2d(channels_in, channels_out, 5, stride, padding=2, bias=False)
        return [convolve, NORMS[norm](channels_out), nn.ReLU()]

    return nn.Sequential(
        *convolution(1, width, stride=image_size // 8),
        *convolution(width, 2 * width, stride=2),
        *convolution(2 * width, 4 * width, stride=1),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * width, classes),
    )


class Digits(lightning.LightningDataModule):
    """The digits for LightningCLI.

    Args:
        batch_size: Images in a batch on one device.
    """

    def __init__(self, batch_size: int = 128) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train, self.test = digits()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 500)
