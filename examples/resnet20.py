"""A ResNet-20 for single-channel images, with a module that keeps all images on its device."""

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from lightning_lars import LargeBatchMixin


class Block(nn.Module):
    """Two convolutions with an identity or subsampling shortcut (He et al. 2015, option A)."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.stride = channels // channels_in
        # Without biases, because the norms that follow have one.
        self.one = nn.Conv2d(channels_in, channels, 3, self.stride, padding=1, bias=False)
        self.norm_one = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_two = nn.BatchNorm2d(channels)

    def forward(self, images: Tensor) -> Tensor:
        branch = functional.relu(self.norm_one(self.one(images)))
        branch = self.norm_two(self.two(branch))
        missing = branch.shape[1] - images.shape[1]
        shortcut = functional.pad(images[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, missing))
        return functional.relu(branch + shortcut)


def resnet20(width: int = 16, blocks: int = 3) -> nn.Sequential:
    """Return the ResNet of He et al. 2015, section 4.2.

    It has ``6 * blocks + 2`` layers, in stages of 1, 2 and 4 times the width.
    """
    stages = [(width, width), (width, 2 * width), (2 * width, 4 * width)]
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *(Block(before if i == 0 else after, after) for before, after in stages for i in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


class ImageClassifier(LargeBatchMixin, lightning.LightningModule):
    """A classifier whose batches are image indices, with random shifts and mirroring of training images.
    Args:
        net: The network.
        train: Images of shape ``(count, 1, height, width)`` and labels.
        test: Likewise.
        **kwargs: Arguments of ``LargeBatchMixin``.
    """

    def __init__(self, net: nn.Module, train: TensorDataset, test: TensorDataset, **kwargs) -> None:
        super().__init__(**kwargs)
        self.net = net
        # Buffers move to the device with the network; these are not saved in checkpoints.
        for name, data in (("train", train), ("test", test)):
            images, labels = data.tensors
            self.register_buffer(f"{name}_images", images, persistent=False)
            self.register_buffer(f"{name}_labels", labels, persistent=False)

    def precise_batch_norm_forward(self, batch: list[Tensor]) -> None:
        self.net(shifted(self.train_images[batch[0]]))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        rows = batch[0]
        loss = functional.cross_entropy(self.net(shifted(self.train_images[rows])), self.train_labels[rows])
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        rows = batch[0]
        right = self.net(self.test_images[rows]).argmax(1) == self.test_labels[rows]
        self.log("accuracy", 100 * right.float().mean(), batch_size=len(rows))


def shifted(images: Tensor, pixels: int = 2) -> Tensor:
    """Shift each image by up to ``pixels``, and mirror half of them at random, without a loop."""
    count, _, height, width = images.shape
    padded = functional.pad(images, [pixels] * 4, mode="replicate")
    down, right = torch.randint(0, 2 * pixels + 1, (2, count, 1), device=images.device)
    rows = torch.arange(height, device=images.device) + down
    columns = torch.arange(width, device=images.device) + right
    mirrored = torch.rand(count, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(count, device=images.device)[:, None, None]
    return padded[each, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
