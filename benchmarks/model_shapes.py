"""The shapes of the layers of well-known models."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch.nn import Parameter

Shape = tuple[int, ...]


def small_cnn() -> list[Shape]:
    """The convolutions and batch norms of a network for small images."""
    widths = [1, 32, 64, 128]
    shapes: list[Shape] = []
    for before, width in pairwise(widths):
        shapes += [(width, before, 3, 3), (width,), (width,)]
    return [*shapes, (10, 1152), (10,)]


def resnet50() -> list[Shape]:
    """He et al. 2016: 161 tensors, 25.6 million parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for conv in ((width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [conv, (conv[0],), (conv[0],)]
            if block == 0:
                shapes += [(4 * width, before, 1, 1), (4 * width,), (4 * width,)]
            before = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def transformer(width: int, layers: int, embeddings: list[Shape]) -> list[Shape]:
    """Transformer blocks: attention and an MLP of four times the width."""
    block = [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*embeddings, *(block + 4 * [(width,)]) * layers]


SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "small-cnn": small_cnn,
    "resnet50": resnet50,
    "vit-b": partial(transformer, 768, 12, [(768, 3, 16, 16), (1, 197, 768), (1000, 768)]),
    "bert-base": partial(transformer, 768, 12, [(30522, 768), (512, 768), (2, 768)]),
    "bert-large": partial(transformer, 1024, 24, [(30522, 1024), (512, 1024), (2, 1024)]),
    "tiny": lambda: [(10, 50)] * 10_000,
}


def parameters(
    shapes: list[Shape], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Parameter]:
    """Return random parameters with gradients."""
    torch.manual_seed(0)
    params = [Parameter(0.05 * torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = 0.01 * torch.randn_like(p)
    return params


def grouped(params: list[Parameter]) -> list[dict[str, object]]:
    """Return two groups: weights, and norms and biases."""
    groups = [
        {"params": [p for p in params if p.ndim > 1]},
        {"params": [p for p in params if p.ndim <= 1], "layer_adaptation": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def elements(shapes: list[Shape]) -> int:
    """Return the number of parameters."""
    return sum(torch.Size(shape).numel() for shape in shapes)
