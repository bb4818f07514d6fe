"""Several parts of a model in one optimizer, each with its own learning rate."""

import csv

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_lars import LAMB, LARS, ExcludeNormAndBias, build_optimizer, param_groups
from tests.support.boring import Boring, trainer


class Parts(LightningModule):
    """A backbone with a norm, and a head."""

    def __init__(self, build):
        super().__init__()
        torch.manual_seed(0)
        self.build = build
        self.backbone = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 2)

    def forward(self, batch):
        return self.head(self.backbone(batch))

    def training_step(self, batch, batch_idx):
        return self(batch).pow(2).mean()

    train_dataloader = Boring.train_dataloader

    def configure_optimizers(self):
        return self.build(self)


def with_a_rate_each(module):
    backbone = param_groups(module.backbone, prefix="backbone")
    head = param_groups(module.head, prefix="head")
    return LARS([{**group, "lr": 0.1} for group in backbone] + head, lr=1.0)


def with_a_part_added(module):
    optimizer = build_optimizer(module.head, LARS, lr=1.0, prefix="head")
    for group in param_groups(module.backbone, prefix="backbone"):
        optimizer.add_param_group({**group, "lr": 0.1})
    return optimizer


NAMES = {"backbone.adapted": 0.1, "backbone.excluded": 0.1, "head.adapted": 1.0, "head.excluded": 1.0}


def logged_rates(tmp_path, module, *callbacks):
    logger = CSVLogger(tmp_path)
    callbacks = [*callbacks, LearningRateMonitor("step")]
    trainer(tmp_path, logger=logger, callbacks=callbacks, log_every_n_steps=1).fit(module)
    with open(logger.experiment.metrics_file_path) as file:
        first = next(csv.DictReader(file))
    return {key.removeprefix("lr-LARS/"): float(value) for key, value in first.items() if "LARS/" in key}


@pytest.mark.parametrize("build", [with_a_rate_each, with_a_part_added])
def test_every_part_has_its_rate_and_the_monitor_shows_it(tmp_path, build):
    module = Parts(build)
    assert logged_rates(tmp_path, module) == NAMES
    names = [name for group in module.trainer.optimizers[0].param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())
    assert set(module.trainer.optimizers[0].trust_ratios()) == {"backbone.0.weight", "head.weight"}


def test_every_part_steps_at_its_rate():
    module = Parts(with_a_rate_each).double()
    optimizer = module.configure_optimizers()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moves = {name: (before[name] - p.detach()).abs().mean() for name, p in module.named_parameters()}
    assert moves["backbone.0.bias"] == pytest.approx(0.1)
    assert moves["head.bias"] == pytest.approx(1.0)
    for name, rate in {"backbone.0.weight": 0.1, "head.weight": 1.0}.items():
        share = 1e-3 * before[name].norm() / torch.ones_like(before[name]).norm()
        assert moves[name].item() == pytest.approx(rate * share.item(), rel=1e-5)


def test_excluded_parameters_can_have_a_rate_in_every_part(tmp_path):
    def build(module):
        optimizer = build_optimizer(module.head, LARS, lr=1.0, excluded_lr=0.05, prefix="head")
        for group in param_groups(module.backbone, prefix="backbone"):
            is_excluded = group["name"] == "backbone.excluded"
            optimizer.add_param_group({**group, "lr": 0.01 if is_excluded else 0.1})
        return optimizer

    assert logged_rates(tmp_path, Parts(build)) == {
        "backbone.adapted": 0.1,
        "backbone.excluded": 0.01,
        "head.adapted": 1.0,
        "head.excluded": 0.05,
    }


def test_two_unnamed_parts_are_distinguished_where_they_are_regrouped(tmp_path):
    def build(module):
        parts = [{"params": module.backbone.parameters(), "lr": 0.1}, {"params": module.head.parameters()}]
        return LARS(parts, lr=1.0)

    assert logged_rates(tmp_path, Parts(build), ExcludeNormAndBias()) == {
        "pg1/adapted": 0.1,
        "pg1/excluded": 0.1,
        "pg2/adapted": 1.0,
        "pg2/excluded": 1.0,
    }


class Unfreezing(BaseFinetuning):
    """Adds what it unfreezes in groups, as docs/parameter_groups.md has it."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.make_trainable(pl_module.backbone)
            for group in param_groups(pl_module.backbone, prefix="backbone"):
                optimizer.add_param_group({**group, "lr": 0.1})


@pytest.mark.parametrize("optimizer", [LARS, LAMB, torch.optim.SGD])
def test_layers_that_finetuning_unfreezes_are_grouped_like_the_rest(tmp_path, optimizer):
    module = Parts(lambda module: build_optimizer(module, optimizer, lr=0.5, weight_decay=0.1))
    callbacks = [Unfreezing(), LearningRateMonitor()]
    fit = trainer(tmp_path, max_epochs=2, callbacks=callbacks, logger=CSVLogger(tmp_path))
    before = module.backbone[0].weight.detach().clone()
    fit.fit(module)
    groups = fit.optimizers[0].param_groups
    assert [(g["name"], g["lr"], g["weight_decay"], g["param_names"]) for g in groups] == [
        ("adapted", 0.5, 0.1, ["head.weight"]),
        ("excluded", 0.5, 0.0, ["head.bias"]),
        ("backbone.adapted", 0.1, 0.1, ["backbone.0.weight"]),
        ("backbone.excluded", 0.1, 0.0, ["backbone.0.bias", "backbone.1.weight", "backbone.1.bias"]),
    ]
    assert not torch.equal(before, module.backbone[0].weight)


def test_parts_without_a_prefix_are_refused_where_names_would_collide():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="unique names, got 'weight' twice"):
        LARS([*param_groups(first), *param_groups(second)], lr=1.0)
