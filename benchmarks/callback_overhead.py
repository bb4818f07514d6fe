"""The overhead of callbacks on a training step of ResNet-50.

    python -m benchmarks.callback_overhead

Uses real Trainers. A hundredth of a step would be lost in the noise between two runs, so callbacks are timed
within one. The model has the layers of ResNet-50, on images of 64 x 64.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lars import (
    LARS,
    GradientNoiseScale,
    PercentileGradientClipping,
    TrustRatioMonitor,
    build_optimizer,
)


def conv(before: int, width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution and its norm."""
    layer = nn.Conv2d(before, width, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width))


class Bottleneck(nn.Module):
    """He et al. 2016, figure 5."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.reduce, self.middle = conv(before, width, 1), conv(width, width, 3, stride)
        self.expand = conv(width, 4 * width, 1)
        same = before == 4 * width and stride == 1
        self.shortcut = nn.Identity() if same else conv(before, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.middle(torch.relu(self.reduce(x))))
        return torch.relu(self.expand(h) + self.shortcut(x))


class ResNet50(LightningModule):
    """Trained on noise."""

    def __init__(self, batch_size: int, steps: int) -> None:
        super().__init__()
        self.batch_size, self.steps = batch_size, steps
        blocks: list[nn.Module] = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
        before = 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for block in range(count):
                blocks.append(Bottleneck(before, width, stride if block == 0 else 1))
                before = 4 * width
        self.net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, LARS, lr=1.0, weight_decay=1e-4)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(self.batch_size * self.steps, 3, 64, 64), self.batch_size)


class Timed(TrustRatioMonitor):
    """A monitor that records its own time in each batch."""

    def __init__(self) -> None:
        super().__init__(alerts=False)
        self.spent: list[float] = []
        self.now = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for report in self._reports.values():
            watched = report.statistics
            watched.detach()
            watched._hooks = [
                watched._optimizer.register_step_pre_hook(self._timed(watched._before_step)),
                watched._optimizer.register_step_post_hook(self._timed(watched._after_step)),
            ]

    def on_train_batch_end(self, *args: Any) -> None:
        self._timed(super().on_train_batch_end)(*args)
        self.spent.append(self.now)
        self.now = 0.0

    def _timed(self, function: Any) -> Any:
        def timed(*args: Any) -> None:
            start = time.perf_counter()
            function(*args)
            self.now += time.perf_counter() - start

        return timed


class TimedClipping(PercentileGradientClipping):
    """Clipping that records its own time in each batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.spent: list[float] = []

    def on_before_optimizer_step(self, *args: Any) -> None:
        start = time.perf_counter()
        super().on_before_optimizer_step(*args)
        self.spent.append(time.perf_counter() - start)


class Clock(Callback):
    """Records the time of each batch."""

    def __init__(self) -> None:
        self.batches: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches.append(time.perf_counter() - self.start)


def train(batch_size: int, steps: int, *callbacks: Callback, **options: Any) -> list[float]:
    """Return the seconds of every batch."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=1,
            callbacks=[*callbacks, clock],
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(ResNet50(batch_size, steps))
    return clock.batches


def monitor(batch_size: int, steps: int, log_every_n_steps: int) -> tuple[float, float]:
    """Return the seconds of a step, and of the monitor in it, averaged over one run."""
    timed = Timed()
    batches = train(batch_size, steps, timed, log_every_n_steps=log_every_n_steps)
    # Skip the first, which allocates memory.
    return statistics.mean(batches[1:]), statistics.mean(timed.spent[1:])


def clipping(batch_size: int, steps: int, per_layer: bool) -> tuple[float, float]:
    """Return the seconds of a step, and of clipping in it, averaged over one run."""
    timed = TimedClipping(per_layer=per_layer)
    batches = train(batch_size, steps, timed)
    return statistics.mean(batches[1:]), statistics.mean(timed.spent[1:])


def noise_scale(batch_size: int, steps: int) -> tuple[float, float]:
    """Return the median seconds of a step, and the extra seconds of a measured step.

    The work is done in backward hooks and only shows in the time of whole steps: every second one is
    measured.
    """
    measure = GradientNoiseScale(every_n_steps=2)
    batches = train(batch_size, 2 * steps, measure, accumulate_grad_batches=2)
    of_steps = [first + second for first, second in zip(batches[::2], batches[1::2], strict=True)]
    measured, plain = statistics.median(of_steps[2::2]), statistics.median(of_steps[1::2])
    return plain, measured - plain


def main() -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=64, help="Images in a batch.")
    parser.add_argument("--steps", type=int, default=51, help="Steps per run; the first is not counted.")
    arguments = parser.parse_args()
    size, steps = arguments.batch_size, arguments.steps
    table = Table("Callback", "Step, ms", "Callback, ms", "Share")
    for name, (step, callback) in (
        ("TrustRatioMonitor, logs every 50 steps", monitor(size, steps, 50)),
        ("TrustRatioMonitor, logs every step", monitor(size, steps, 1)),
        ("GradientNoiseScale, in a step of 2 batches that it measures", noise_scale(size, steps)),
        ("PercentileGradientClipping", clipping(size, steps, per_layer=False)),
        ("PercentileGradientClipping, per layer", clipping(size, steps, per_layer=True)),
    ):
        table.add_row(name, f"{1e3 * step:.0f}", f"{1e3 * callback:.2f}", f"{callback / step:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
