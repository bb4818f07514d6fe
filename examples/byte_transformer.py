"""A byte-level transformer, trained on the sources of Python's standard library."""

import math
import sysconfig
import zlib
from pathlib import Path

import lightning
import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_lars import LargeBatchMixin

BYTES = 256


def standard_library(limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the bytes of the training sources, and of one file in ten for validation, chosen by name.

    Args:
        limit: Maximum number of bytes of each; None for all.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if not name.startswith(("site-packages/", "dist-packages/")):
            parts[zlib.crc32(name.encode()) % 10 == 0].append(path.read_bytes())
    train, validation = (numpy.frombuffer(b"\n".join(files), numpy.uint8)[:limit].copy() for files in parts)
    return torch.from_numpy(train), torch.from_numpy(validation)


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention, then an MLP, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        mixed = self.query_key_value(self.attention_norm(x)).view(count, length, 3, self.heads, -1)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(attended.transpose(1, 2).reshape(count, length, width))
        return x + self.mlp(self.mlp_norm(x))


class ByteTransformer(LargeBatchMixin, lightning.LightningModule):
    """Predicts every byte from those before it, in sequences whose start positions form the batch.

    Args:
        train: Bytes, of shape ``(count,)``.
        validation: Likewise.
        length: Sequence length in bytes.
        width: Width of the hidden layers.
        layers: Number of blocks.
        **kwargs: Arguments of ``LargeBatchMixin``.
    """

    def __init__(
        self, train: Tensor, validation: Tensor, length: int, width: int, layers: int, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.length = length
        self.register_buffer("train_bytes", train, persistent=False)
        self.register_buffer("validation_bytes", validation, persistent=False)
        self.embedding = nn.Embedding(BYTES, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 64)) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Map bytes of shape ``(batch, length)`` to logits of the bytes that follow each."""
        return self.head(self.norm(self.blocks(self.embedding(text) + self.position)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self._nats(self.train_bytes, batch[0])
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        bits = self._nats(self.validation_bytes, batch[0]) / math.log(2)
        self.log("bits per byte", bits, batch_size=len(batch[0]))

    def _nats(self, source: Tensor, starts: Tensor) -> Tensor:
        offsets = torch.arange(self.length + 1, device=starts.device)
        text = source[starts[:, None] + offsets].long()
        return functional.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
