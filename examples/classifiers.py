"""A classifier without an optimizer, and one with the mixin."""

import lightning
from images import network
from torch import Tensor
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from lightning_lars import LargeBatchMixin


class Classifier(lightning.LightningModule):
    """The network with its loss and accuracy.

    Args:
        image_size: Height and width of the images.
        width: Channels of the first convolution.
    """

    def __init__(self, image_size: int = 8, width: int = 16) -> None:
        super().__init__()
        self.net = network(image_size, width)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "accuracy")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test accuracy")

    def _evaluate(self, batch: list[Tensor], name: str) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log(name, self.accuracy, prog_bar=True)


class MixinClassifier(LargeBatchMixin, Classifier):
    """The same classifier, with optimizer and schedule as arguments of the module."""
