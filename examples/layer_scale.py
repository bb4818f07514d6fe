"""The effect of trust ratios on gains and tokens: residual networks with gains adapted, and excluded.

python examples/layer_scale.py --help

Trains a residual network, or a small vision transformer, whose blocks have a layer scale initialized to 1e-6,
over several learning rates, once with ``exclude_gain=False`` and once with the defaults. Prints the test
accuracy of each, and the final magnitude of the layer scale.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import rich
import torch
from images import FASHION_MNIST, digits, fashion_mnist
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from lightning_lars import LAMB, LARS, WarmupDecayLR, build_optimizer

RATES = {"LAMB": (0.001, 0.003, 0.01, 0.03, 0.1), "LARS": (0.3, 1.0, 3.0, 10.0)}
OPTIMIZERS = {"LAMB": LAMB, "LARS": LARS}


class Scaled(nn.Module):
    """``x + gamma * f(norm(x))``, with a gamma initialized so small that the block is nearly the identity."""

    def __init__(self, width: int, inner: nn.Module, start: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = inner
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.inner(self.norm(x))


class Attention(nn.Module):
    """Self-attention with four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, dim=-1))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Return a two-layer MLP."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Residual(nn.Module):
    """A stem, residual blocks, and a head; initially, the blocks are nearly the identity."""

    def __init__(self, size: int, start: float, width: int = 64, depth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(size * size, width)
        self.blocks = nn.Sequential(*(Scaled(width, mlp(width, 2 * width), start) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images.flatten(1))))


class VisionTransformer(nn.Module):
    """A vision transformer with 16 patches, a class token and a position embedding."""

    def __init__(self, size: int, start: float, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, size // 4, stride=size // 4)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 17, width))
        parts = [(Attention(width), mlp(width, 2 * width)) for _ in range(depth)]
        self.blocks = nn.Sequential(*(Scaled(width, part, start) for pair in parts for part in pair))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x)[:, 0]))


MODELS = {"residual": Residual, "vit": VisionTransformer}


def shuffled(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of an epoch."""
    for chosen in torch.randperm(len(labels)).split(batch_size):
        if len(chosen) == batch_size:
            yield images[chosen], labels[chosen]


def train(
    arguments: argparse.Namespace, data: list[Tensor], name: str, lr: float, gains: bool, seed: int
) -> tuple[float, float]:
    """Return the test accuracy in percent and the median magnitude of the layer scale."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    model = MODELS[arguments.model](images.shape[-1], arguments.start)
    optimizer = build_optimizer(
        model,
        OPTIMIZERS[name],
        exclude_gain=gains,
        excluded_lr=arguments.excluded_lr,
        lr=lr,
        weight_decay=arguments.decay,
    )
    steps = arguments.epochs * (len(labels) // arguments.batch_size)
    scheduler = WarmupDecayLR(optimizer, warmup_steps=max(1, steps // 10), total_steps=max(2, steps))
    for _ in range(arguments.epochs):
        for batch, target in shuffled(images, labels, arguments.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(model(batch), target).backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).double().mean().item()
    magnitudes = [p.detach().abs().flatten() for key, p in model.named_parameters() if key.endswith("gamma")]
    return 100 * accuracy, torch.cat(magnitudes).median().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="residual")
    parser.add_argument("--dataset", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST")
    parser.add_argument("--images", type=int, default=10_000, help="images of Fashion-MNIST to train on")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--lr", type=float, nargs="+", help="learning rates instead of the default ones")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--decay", type=float, default=1e-4, help="weight decay")
    parser.add_argument("--excluded-lr", type=float, help="learning rate of excluded parameters, if not lr")
    parser.add_argument("--start", type=float, default=1e-6, help="initial value of the layer scale")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train_set, test_set = digits() if arguments.dataset == "digits" else fashion_mnist(arguments.data_dir)
    data = [each[: arguments.images] for each in (*train_set.tensors, *test_set.tensors)]
    title = f"Test accuracy in %, {arguments.model} on {arguments.dataset}, {arguments.epochs} epochs"
    table = Table("Optimizer", "lr", "Gains adapted", "magnitude", "Gains excluded", "magnitude", title=title)
    for name in arguments.optimizer:
        for lr in arguments.lr or RATES[name]:
            cells = []
            for excluded in (False, True):
                runs = [train(arguments, data, name, lr, excluded, seed) for seed in range(arguments.seeds)]
                accuracies, magnitudes = zip(*runs, strict=True)
                cells += [
                    " ".join(f"{each:.1f}" for each in accuracies),
                    f"{sorted(magnitudes)[len(magnitudes) // 2]:.1e}",
                ]
            table.add_row(name, f"{lr:g}", *cells)
    rich.print(table)


if __name__ == "__main__":
    main()
