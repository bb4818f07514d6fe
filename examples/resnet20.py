"""A ResNet-20 for images of one channel, which holds all of its images on its own device."""

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from lightning_lars import LargeBatchMixin


class Block(nn.Module):
    """Two convolutions, around which the input goes unchanged, or thinned out (He et al. 2015, option A)."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.stride = channels // channels_in
        # Without biases: the norms behind them have one.
        self.one = nn.Conv2d(channels_in, channels, 3, self.stride, padding=1, bias=False)
        self.norm_of_one = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_of_two = nn.BatchNorm2d(channels)

    def forward(self, images: Tensor) -> Tensor:
        branch = functional.relu(self.norm_of_one(self.one(images)))
        branch = self.norm_of_two(self.two(branch))
        missing = branch.shape[1] - images.shape[1]
        around = functional.pad(images[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, missing))
        return functional.relu(branch + around)


def resnet20(width: int = 16, blocks: int = 3) -> nn.Sequential:
    """He et al. 2015, section 4.2: ``6 * blocks + 2`` layers, of 1, 2 and 4 times the width."""
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
    """A network that is trained on its images by number, each moved by up to two pixels, or mirrored.

    Args:
        net: The network.
        train: Images of shape ``(count, 1, height, width)`` and labels.
        test: Likewise.
        **kwargs: Optimizer, schedule and what they leave out.
    """

    def __init__(self, net: nn.Module, train: TensorDataset, test: TensorDataset, **kwargs) -> None:
        super().__init__(**kwargs)
        self.net = net
        # They move to the device with the network, and into no checkpoint.
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
    """Move each image by up to so many pixels, and mirror every other one, without a loop."""
    count, _, height, width = images.shape
    padded = functional.pad(images, [pixels] * 4, mode="replicate")
    down, right = torch.randint(0, 2 * pixels + 1, (2, count, 1), device=images.device)
    rows = torch.arange(height, device=images.device) + down
    columns = torch.arange(width, device=images.device) + right
    mirrored = torch.rand(count, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(count, device=images.device)[:, None, None]
    return padded[each, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
