"""A classifier without an optimizer, and one with the mixin."""

import lightning
from images import network
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from lightning_lars import LargeBatchMixin


class Classifier(lightning.LightningModule):
    """The network with its loss and accuracy.

    Args:
        image_size: Height and width of the images.
        width: Channels of the first convolution.
        norm: ``"batch"``, over the images of a batch on one device, or ``"group"``, of every image by itself.
    """

    def __init__(self, image_size: int = 8, width: int = 16, norm: str = "batch") -> None:
        super().__init__()
        self.net = network(image_size, width, norm=norm)
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


class ShardedClassifier(MixinClassifier):
    """The same, with every layer sharded across all devices by FSDP2."""

    def configure_model(self) -> None:
        # Lightning calls this again before it tests.
        if not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:
                if len(list(layer.parameters())) > 0:
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
