"""One run of the large-batch study: data, networks, training and outcome."""

import dataclasses
import logging
import time
import warnings
from functools import partial
from pathlib import Path

import lightning
import torch
from images import batches, digits, fashion_mnist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lars import (
    LAMB,
    LARS,
    BatchSizeScaling,
    LargeBatchMixin,
    PreciseBatchNorm,
    WarmupDecayLR,
)
from lightning_lars.learning_rate.batch_scaling import ScalingRule, scaling_exponent, scaling_factor

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "AdamW": torch.optim.AdamW,
    "LARS": partial(LARS, momentum=0.9),
    "LAMB": LAMB,
    "Bounded LAMB": partial(LAMB, trust_clip=0.1),
    "Muon": torch.optim.AdamW,  # for all but the matrices
    "Muon in bfloat16": torch.optim.AdamW,
}
DECAYS = {"linear": {"decay": "polynomial", "power": 1.0}, "cosine": {"decay": "cosine"}}
PRECISE_SAMPLES = 8192  # samples for PreciseBatchNorm, at any batch size


@dataclasses.dataclass(frozen=True)
class Data:
    """Images for training, validation and test."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset


@dataclasses.dataclass(frozen=True)
class Choice:
    """An optimizer with its tuned hyperparameters, and the batch size at which they were tuned.

    ``excluded_lr`` is the rate of norms and biases, if different from the rest. ``clip`` is the
    ``trust_clip`` of LARS, and the norm that gradients are clipped to for the others.
    """

    optimizer: str
    lr: float
    weight_decay: float
    excluded_lr: float | None = None
    clip: float | None = None
    decay: str = "linear"
    batch_size: int = 128


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: a choice, and the batch size that it is transferred to.

    ``rule`` scales the learning rate from the batch size of the choice to the batch size of the run. Weight
    decay is scaled accordingly, so that ``lr * weight_decay * steps`` stays constant (Wang & Aitchison 2024),
    unless ``scales_weight_decay`` is False.
    """

    model: str
    choice: Choice
    batch_size: int
    seed: int
    rule: ScalingRule | float = "none"
    scales_weight_decay: bool = True


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a run: accuracies in percent, and the highest learning rate that a step used."""

    steps: int
    peak_lr: float
    weight_decay: float
    train_loss: float
    validation: float
    test: float
    cpu_seconds: float


def load(data_dir: Path | None, train_images: int, validation_images: int) -> Data:
    """Load Fashion-MNIST, or the digits without a folder, and split off validation images."""
    train, test = digits() if data_dir is None else fashion_mnist(data_dir)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    split = {"train": order[:train_images], "validation": order[len(order) - validation_images :]}
    if train_images + validation_images > len(train):
        raise SystemExit(
            f"{train_images:,} training and {validation_images:,} validation images exceed {len(train):,}"
        )
    return Data(test=test, **{name: TensorDataset(*train[rows]) for name, rows in split.items()})


def network(name: str, image_size: int) -> nn.Module:
    """Return the CNN with batch norm, the MLP without norms, or the transformer with layer norms."""
    if name == "cnn":
        return ResidualNet(stride=4 if image_size == 28 else 1)
    if name == "transformer":
        return PatchTransformer(image_size // 4)
    layers: list[nn.Module] = [nn.Flatten()]
    for size in (image_size**2, 128, 128, 128):
        layers += [nn.Linear(size, 128), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(128, 10))
    for layer in net:
        if isinstance(layer, nn.Linear):  # keeps the scale of signals through ReLUs (He et al. 2015)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


class ResidualNet(nn.Module):
    """Three convolutions with batch norm, the last one residual, and a linear head: 6,306 parameters."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(1, 8, 5, stride, padding=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        )
        # Without biases, because the norms that follow have one.
        self.residual = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        return self.head(functional.relu(features + self.residual(features)).flatten(1))


class PatchTransformer(nn.Module):
    """Two pre-norm blocks over 16 patches, and a linear head on their mean: 19,594 parameters at 7 x 7."""

    def __init__(self, patch_size: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch_size, patch_size)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        block = partial(nn.TransformerEncoderLayer, width, 2, 2 * width, dropout=0.0, activation="gelu")
        self.blocks = nn.Sequential(*(block(batch_first=True, norm_first=True) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(patches)).mean(1))


class Classifier(LargeBatchMixin, lightning.LightningModule):
    """A network with its loss and accuracy, which logs nothing during training."""

    def __init__(self, net: nn.Module, **kwargs) -> None:
        super().__init__(**kwargs)
        self.net = net
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "validation")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: list[Tensor], name: str) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log(name, self.accuracy)


class Watch(lightning.Callback):
    """Records the highest learning rate of any step, and the mean loss of the last tenth of the steps."""

    def __init__(self) -> None:
        self.peak_lr = 0.0
        self.losses: list[Tensor] = []

    @property
    def train_loss(self) -> float:
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return torch.stack(last).mean().item()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Registered after the hook of BatchSizeScaling, so this sees the scaled rate.
        trainer.optimizers[0].register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.peak_lr = max(self.peak_lr, optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        # Lightning divides the loss by the batches that it accumulates.
        self.losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)


def be_quiet() -> None:
    """Silence Lightning's messages that repeat for every run."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The '.*' does not have many workers")
    warnings.filterwarnings("ignore", "The number of training batches")
    warnings.filterwarnings("ignore", "`isinstance")


def _muon(name: str) -> type[torch.optim.Optimizer]:
    if name == "Muon in bfloat16":
        return torch.optim.Muon
    from float32_muon import Float32Muon  # needs torch 2.9, which the rest of the study does not

    return Float32Muon


def train(run: Run, epochs: int, data: Data, accelerator: str = "cpu") -> Outcome:
    """Train once. All runs warm up over a tenth of their steps."""
    started = time.process_time()
    lightning.seed_everything(run.seed, verbose=False)
    choice = run.choice
    net = network(run.model, data.train[0][0].shape[-1])
    # A pass drops the last incomplete batch; additional passes make up for it.
    steps_of_pass = len(data.train) // run.batch_size
    passes = round(epochs * len(data.train) / run.batch_size / steps_of_pass)
    steps = passes * steps_of_pass
    weight_decay = choice.weight_decay
    if run.scales_weight_decay:
        exponent = 1 - scaling_exponent(run.rule)
        weight_decay *= scaling_factor(run.batch_size, choice.batch_size, exponent)
    options = {"lr": choice.lr, "weight_decay": weight_decay}
    of_matrices = None
    if choice.optimizer.startswith("Muon"):
        # Liu et al. 2025 (arXiv:2502.16982): updates as long as those of AdamW.
        of_matrices = partial(_muon(choice.optimizer), adjust_lr_fn="match_rms_adamw", **options)
    if choice.optimizer == "LARS":
        options["trust_clip"] = choice.clip
    classifier = Classifier(
        net,
        optimizer=partial(OPTIMIZERS[choice.optimizer], **options),
        lr_scheduler=partial(WarmupDecayLR, warmup_steps=max(1, steps // 10), **DECAYS[choice.decay]),
        excluded_lr=choice.excluded_lr,
        matrix_optimizer=of_matrices,
    )
    watch = Watch()
    callbacks = [BatchSizeScaling(choice.batch_size, rule=run.rule), watch]
    if any(isinstance(layer, nn.BatchNorm2d) for layer in net.modules()):
        callbacks.append(PreciseBatchNorm(max(1, PRECISE_SAMPLES // run.batch_size)))
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=passes,
        gradient_clip_val=None if choice.optimizer == "LARS" else choice.clip,
        check_val_every_n_epoch=passes,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(classifier, batches(data.train, run.batch_size, True), batches(data.validation, 1000, False))
    validation = 100 * trainer.callback_metrics["validation"].item()
    trainer.test(classifier, batches(data.test, 1000, False), verbose=False)
    test = 100 * trainer.callback_metrics["test"].item()
    seconds = time.process_time() - started
    return Outcome(
        trainer.global_step, watch.peak_lr, weight_decay, watch.train_loss, validation, test, seconds
    )
