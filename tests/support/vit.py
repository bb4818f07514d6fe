"""A small vision transformer, and the parameter groups of MAE, written from its ``util/lr_decay.py``."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_lars import LargeBatchMixin


class Block(nn.Module):
    """A block with a matrix, a norm and a bias."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, tokens):
        return tokens + self.linear(self.norm(tokens)).relu()


class ViT(nn.Module):
    """Classifies images of 8 x 8 pixels by 4 patches."""

    def __init__(self, layers: int = 2, width: int = 8):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, width))
        self.patch_embed = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.ModuleList([Block(width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def no_weight_decay(self):
        return {"pos_embed", "cls_token"}

    def forward(self, images):
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens).mean(1))


class PlainViT(LightningModule):
    """Holds the model, as modules do, and says nothing of its optimizer; 8 batches of 2."""

    def __init__(self, layers: int = 2):
        super().__init__()
        self.model = ViT(layers)

    def training_step(self, batch, batch_idx):
        return self.model(batch).logsumexp(1).mean()

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        return DataLoader(torch.rand(16, 3, 8, 8, generator=generator), batch_size=2)


class TrainedViT(LargeBatchMixin, PlainViT):
    """With the optimizer of the mixin."""


def mae_groups(model, weight_decay, layer_decay):
    """Return groups by the rules of MAE: by name, with a scale for a schedule to multiply by.

    LARS and LAMB adapt no parameter without decay, as those of the authors' other recipes.
    """
    last = len(model.blocks) + 1
    groups = {}
    for name, parameter in model.named_parameters():
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = last
        decays = parameter.ndim > 1 and name not in model.no_weight_decay()
        settings = {
            "params": [],
            "lr_scale": layer_decay ** (last - layer),
            "weight_decay": weight_decay if decays else 0.0,
            "layer_adaptation": decays,
        }
        groups.setdefault((layer, decays), settings)["params"].append(parameter)
    return list(groups.values())
