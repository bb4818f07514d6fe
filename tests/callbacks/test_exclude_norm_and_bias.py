"""Regrouping an optimizer that was built over bare parameters."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import lr_scheduler

from lightning_lars import LAMB, LARS, ExcludeNormAndBias, build_optimizer
from tests.support.boring import Boring, trainer

LARS_WITH_DECAY = partial(LARS, lr=0.5, weight_decay=0.1)

SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multi step": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, step_size_up=3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


class Bare(LightningModule):
    """Hands the optimizer bare parameters, in one group or two."""

    def __init__(self, optimizer=LARS_WITH_DECAY, scheduler=None, groups=1):
        super().__init__()
        torch.manual_seed(0)
        self.build, self.schedule, self.groups = optimizer, scheduler, groups
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.rates, self.momenta = [], []

    training_step = Boring.training_step
    train_dataloader = Boring.train_dataloader

    def configure_optimizers(self):
        parameters = list(self.parameters())
        if self.groups == 2:
            parameters = [
                {"params": self.net[:2].parameters(), "name": "body"},
                {"params": self.net[2].parameters(), "name": "head", "lr": 0.1},
            ]
        optimizer = self.build(parameters)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]

    def on_train_batch_start(self, batch, batch_idx):
        groups = self.optimizers().optimizer.param_groups
        self.rates.append([group["lr"] for group in groups])
        self.momenta.append([group.get("momentum", group.get("betas")) for group in groups])


def fit(tmp_path, module, *callbacks, **options):
    trainer(tmp_path, callbacks=list(callbacks), **options).fit(module)
    return module


def test_splits_a_group_into_adapted_and_excluded(tmp_path):
    adapted, excluded = fit(tmp_path, Bare(), ExcludeNormAndBias()).trainer.optimizers[0].param_groups
    assert (adapted["name"], adapted["param_names"]) == ("adapted", ["net.0.weight", "net.2.weight"])
    assert (adapted["layer_adaptation"], adapted["weight_decay"]) == (True, 0.1)
    assert excluded["param_names"] == ["net.0.bias", "net.1.weight", "net.1.bias", "net.2.bias"]
    assert (excluded["layer_adaptation"], excluded["weight_decay"]) == (False, 0.0)
    assert excluded["name"] == "excluded"


def test_keeps_the_groups_that_are_there_apart(tmp_path):
    groups = fit(tmp_path, Bare(groups=2), ExcludeNormAndBias()).trainer.optimizers[0].param_groups
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("body/adapted", 0.5),
        ("body/excluded", 0.5),
        ("head/adapted", 0.1),
        ("head/excluded", 0.1),
    ]


def test_trains_as_if_the_optimizer_had_been_built_in_groups(tmp_path):
    class Grouped(Bare):
        def configure_optimizers(self):
            return build_optimizer(self, self.build)

    regrouped = fit(tmp_path, Bare(), ExcludeNormAndBias())
    grouped, bare = fit(tmp_path, Grouped()), fit(tmp_path, Bare())
    for name, weight in grouped.state_dict().items():
        assert torch.equal(weight, regrouped.state_dict()[name]), name
    assert not torch.equal(bare.net[0].bias, regrouped.net[0].bias)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_leaves_the_trajectory_of_every_scheduler_as_it_was(tmp_path, scheduler, groups):
    before = fit(tmp_path, Bare(scheduler=scheduler, groups=groups))
    after = fit(tmp_path, Bare(scheduler=scheduler, groups=groups), ExcludeNormAndBias())
    for values in ("rates", "momenta"):
        expected = [[value for value in step for _ in range(2)] for step in getattr(before, values)]
        assert getattr(after, values) == expected
    assert len({tuple(step) for step in before.rates}) > 1


def test_leaves_the_trajectory_of_a_plateau_as_it_was(tmp_path):
    class Plateau(Bare):
        def configure_optimizers(self):
            optimizer = self.build(self.parameters())
            scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1.0, min_lr=[0.01])
            config = {"scheduler": scheduler, "interval": "step", "monitor": "loss"}
            return {"optimizer": optimizer, "lr_scheduler": config}

    before = fit(tmp_path, Plateau())
    after = fit(tmp_path, Plateau(), ExcludeNormAndBias())
    assert after.rates == [[rate, rate] for (rate,) in before.rates]
    assert before.rates[-1] != before.rates[0]


@pytest.mark.parametrize("optimizer", [partial(LAMB, lr=0.1), partial(LARS, lr=0.5, weight_decay=0.1)])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, optimizer):
    schedule = SCHEDULERS["sequential"]
    straight = fit(tmp_path, Bare(optimizer, schedule), ExcludeNormAndBias(), max_epochs=2)
    first = trainer(tmp_path, callbacks=[ExcludeNormAndBias()])
    first.fit(Bare(optimizer, schedule))
    first.save_checkpoint(tmp_path / "a.ckpt")
    resumed = Bare(optimizer, schedule)
    fit_again = trainer(tmp_path, callbacks=[ExcludeNormAndBias()], max_epochs=2)
    fit_again.fit(resumed, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.rates == straight.rates[8:]
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_frozen_norms_are_excluded_before_they_are_trained(tmp_path):
    module = Bare()
    module.net[1].requires_grad_(False)
    _, excluded = fit(tmp_path, module, ExcludeNormAndBias()).trainer.optimizers[0].param_groups
    assert "net.1.weight" in excluded["param_names"]


def test_patterns_add_to_the_norms(tmp_path):
    module = fit(tmp_path, Bare(), ExcludeNormAndBias(exclude=["net.2.*"], exclude_bias=False))
    adapted, excluded = module.trainer.optimizers[0].param_groups
    assert adapted["param_names"] == ["net.0.weight", "net.0.bias"]
    assert excluded["param_names"] == ["net.1.weight", "net.1.bias", "net.2.weight", "net.2.bias"]


def test_a_pattern_that_matches_nothing_raises(tmp_path):
    with pytest.raises(ValueError, match="got 'head', which matches none"):
        fit(tmp_path, Bare(), ExcludeNormAndBias(exclude=["head"]))


def test_groups_that_are_apart_already_are_left_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="ExcludeNormAndBias found nothing to split in LARS"):
        fit(tmp_path, Boring(optimizer=partial(LARS, lr=0.5)), ExcludeNormAndBias())


def test_an_optimizer_of_other_parameters_raises(tmp_path):
    class Stale(Bare):
        def configure_optimizers(self):
            return LARS(nn.Linear(2, 2).parameters(), lr=0.5)

    with pytest.raises(ValueError, match="optimizer must hold parameters of the module, got LARS with none"):
        fit(tmp_path, Stale(), ExcludeNormAndBias())
