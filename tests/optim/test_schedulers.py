"""Every learning rate scheduler of torch can drive LARS and LAMB."""

import inspect

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from lightning_lars import LAMB, LARS
from tests.support.layers import give_gradients, groups, layers

SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda step: 0.5**step},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.5},
    "StepLR": {"step_size": 1},
    "MultiStepLR": {"milestones": [1]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.5},
    "CosineAnnealingLR": {"T_max": 4},
    "CosineAnnealingWarmRestarts": {"T_0": 4},
    "PolynomialLR": {},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.5, "total_steps": 7},
    "ReduceLROnPlateau": {"patience": 0},
    "SWALR": {"swa_lr": 0.5, "anneal_epochs": 2},
}
COMPOSED = {"ChainedScheduler", "SequentialLR"}
both = pytest.mark.parametrize("optimizer_class", [LARS, LAMB])


def build(name, optimizer):
    scheduler_class = SWALR if name == "SWALR" else getattr(lr_scheduler, name)
    return scheduler_class(optimizer, **SCHEDULERS[name])


def drive(optimizer, scheduler, steps=3):
    """Step both; return the learning rate and the momentum of each step."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    used = []
    for step in range(steps):
        used.append([(g["lr"], g.get("momentum", g.get("betas", (None,)))) for g in optimizer.param_groups])
        give_gradients(params, step)
        optimizer.step()
        arguments = (1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
        scheduler.step(*arguments)
    return used


def test_the_table_names_every_scheduler_of_torch():
    public = {
        name
        for name, own in inspect.getmembers(lr_scheduler, inspect.isclass)
        if issubclass(own, lr_scheduler.LRScheduler)
        and name in lr_scheduler.__all__
        and name != "LRScheduler"
    }
    assert public == (set(SCHEDULERS) - {"SWALR"}) | COMPOSED


@both
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_changes_the_learning_rate_that_a_step_uses(optimizer_class, name):
    optimizer = optimizer_class(groups(layers()), lr=0.3)
    used = drive(optimizer, build(name, optimizer), steps=6)
    assert len({lr for groups_of_step in used for lr, _ in groups_of_step}) > 1
    assert all(p.isfinite().all() for group in optimizer.param_groups for p in group["params"])


@both
def test_chained_schedulers_drive_it(optimizer_class):
    optimizer = optimizer_class(groups(layers()), lr=0.4)
    chained = lr_scheduler.ChainedScheduler([build("ExponentialLR", optimizer), build("StepLR", optimizer)])
    used = drive(optimizer, chained)
    assert [groups_of_step[0][0] for groups_of_step in used] == pytest.approx([0.4, 0.02, 0.001])


@both
def test_sequential_schedulers_drive_it(optimizer_class):
    optimizer = optimizer_class(groups(layers()), lr=0.4)
    parts = [build("ConstantLR", optimizer), build("ExponentialLR", optimizer)]
    used = drive(optimizer, lr_scheduler.SequentialLR(optimizer, parts, milestones=[1]))
    assert [groups_of_step[0][0] for groups_of_step in used] == pytest.approx([0.4 / 3, 0.4, 0.2])


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_cycle_moves_the_momentum_of_lars(name):
    optimizer = LARS(groups(layers()), lr=0.3)
    used = drive(optimizer, build(name, optimizer), steps=2)
    assert used[0][0][1] != used[1][0][1]


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_cycle_moves_the_first_beta_of_lamb(name):
    optimizer = LAMB(groups(layers()), lr=0.3)
    used = drive(optimizer, build(name, optimizer), steps=2)
    assert used[0][0][1][0] != used[1][0][1][0]
    assert used[0][0][1][1] == used[1][0][1][1]


@both
def test_a_scheduler_fills_a_tensor_lr_in_place(optimizer_class):
    lr = torch.tensor(0.4)
    optimizer = optimizer_class(layers().items(), lr=lr)
    scheduler = build("ExponentialLR", optimizer)
    drive(optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] is lr
    torch.testing.assert_close(lr, torch.tensor(0.05))
