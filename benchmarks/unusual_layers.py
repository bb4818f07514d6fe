"""What the trust ratio does to a layer without a gradient, and to one that starts at zero.

    python -m benchmarks.unusual_layers

The first table shows what remains of the norm of a layer of 64 x 64 after 100 steps with a gradient of 0. The
second shows LoRA of rank 8, whose B starts at zero, fine-tuning a network from scikit-learn's digits to their
transposes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

from lightning_lars import LAMB, LARS, recipes

MLPERF: Callable[..., Optimizer] = recipes.mlperf_resnet50(4096)["optimizer"]

UNUSED: dict[str, Callable[..., Optimizer]] = {
    "MLPerf's LARS (lr=10, weight_decay=2e-4)": MLPERF,
    "MLPerf's LARS, weight_decay=1e-9": partial(MLPERF, weight_decay=1e-9),
    "MLPerf's LARS, trust_clip=0.02": partial(MLPERF, trust_clip=0.02),
    "MLPerf's LARS, decoupled_weight_decay=True": partial(MLPERF, decoupled_weight_decay=True),
    "LAMB(lr=0.01, weight_decay=0.01)": partial(LAMB, lr=0.01, weight_decay=0.01),
    "LAMB(lr=0.01, weight_decay=1e-9)": partial(LAMB, lr=0.01, weight_decay=1e-9),
    "LAMB(lr=0.01, weight_decay=0.01, decoupled_weight_decay=True)": partial(
        LAMB, lr=0.01, weight_decay=0.01, decoupled_weight_decay=True
    ),
    "SGD(lr=0.1, momentum=0.9, weight_decay=2e-4)": partial(SGD, lr=0.1, momentum=0.9, weight_decay=2e-4),
    "AdamW(lr=0.01, weight_decay=0.01)": partial(AdamW, lr=0.01, weight_decay=0.01),
}

FROM_ZERO: dict[str, Callable[..., Optimizer]] = {
    f"{optimizer.__name__}(lr={lr:g}{clip})": partial(optimizer, lr=lr, **options)
    for optimizer, lrs, trust_clip in ((LARS, (1.0, 3.0, 10.0), 0.01), (LAMB, (0.05, 0.1, 0.3), 0.1))
    for lr in lrs
    for clip, options in (("", {}), (f", trust_clip={trust_clip:g}", {"trust_clip": trust_clip}))
}


def left_without_gradient(build: Callable[..., Optimizer], steps: int = 100) -> float:
    """Return the norm of a layer after steps with a gradient of 0, relative to the initial norm."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(64, 64))
    before = w.detach().norm()
    optimizer = build([w])
    for _ in range(steps):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    return float(w.detach().norm() / before)


class LoRA(nn.Module):
    """Hu et al. 2021: ``W x + alpha / r * B A x``, where A is random and B zero."""

    def __init__(self, linear: nn.Linear, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora_a = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * self.lora_b(self.lora_a(x))


def digits() -> tuple[Tensor, Tensor]:
    """Return flattened 8 x 8 images with values in [0, 1], and their labels."""
    data: Any = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def trained_network(images: Tensor, labels: Tensor, steps: int = 600) -> nn.Sequential:
    """Return a network of three layers, trained on the images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    train(network, AdamW(network.parameters(), lr=1e-3), images, labels, 128, steps)
    return network


def train(
    network: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor, batch_size: int, steps: int
) -> list[float]:
    """Train and return the loss of every step."""
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(images), (batch_size,))
        loss = functional.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fine_tune(
    build: Callable[..., Optimizer], network: nn.Sequential, images: Tensor, labels: Tensor, steps: int = 100
) -> tuple[float, float]:
    """Return the largest loss relative to the first, and the final accuracy."""
    torch.manual_seed(1)
    tuned = nn.Sequential(*(LoRA(each) if isinstance(each, nn.Linear) else each for each in network))
    named = [(name, p) for name, p in tuned.named_parameters() if p.requires_grad]
    losses = train(tuned, build(named), images, labels, 256, steps)
    with torch.no_grad():
        accuracy = (tuned(images).argmax(1) == labels).float().mean()
    return max(losses) / losses[0], float(accuracy)


def main() -> None:
    """Print both tables."""
    console = Console()
    table = Table("100 steps with a gradient of 0", "Remaining norm")
    for name, build in UNUSED.items():
        table.add_row(name, f"{left_without_gradient(build):.1%}")
    console.print(table)
    images, labels = digits()
    network = trained_network(images, labels)
    transposed = images.view(-1, 8, 8).transpose(1, 2).reshape(-1, 64)
    table = Table("100 steps of LoRA", "Largest loss / first", "Accuracy")
    for name, build in FROM_ZERO.items():
        worst, accuracy = fine_tune(build, network, transposed, labels)
        table.add_row(name, f"{worst:.3g}", f"{accuracy:.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
