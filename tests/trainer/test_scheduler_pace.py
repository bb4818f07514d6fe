"""A WarmupDecayLR that is not stepped once per optimizer step warns, once."""

import copy
import re
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, SequentialLR

from lightning_lars import LAMB, LARS, WarmupDecayLR
from tests.support.walk import BATCHES, Walk, walk
from tests.support.wrappers import SAM, Bare, HookedLookahead, Lookahead

OPTIMIZERS = [torch.optim.SGD, torch.optim.AdamW, LARS, LAMB]
SAID = "WarmupDecayLR counts optimizer steps, and {} took {} since the scheduler's last step: call step()"
schedule = partial(WarmupDecayLR, warmup_steps=4, total_steps=100)


@pytest.fixture(params=OPTIMIZERS, ids=lambda each: each.__name__)
def optimizer(request):
    return request.param([nn.Parameter(torch.ones(3)) for _ in range(2)], lr=0.1)


def backward(optimizer):
    loss = sum(p.sum() for group in optimizer.param_groups for p in group["params"])
    loss.backward()
    return loss


def step(optimizer, times=1):
    for _ in range(times):
        backward(optimizer)
        optimizer.step()
        optimizer.zero_grad()


def said(caught):
    return [str(each.message) for each in caught if "counts optimizer steps" in str(each.message)]


@pytest.mark.parametrize("times", [2, 3, 50])
def test_too_few_steps_are_pointed_out_once(optimizer, times):
    scheduler = schedule(optimizer)
    step(optimizer, times)
    with pytest.warns(UserWarning, match=re.escape(SAID.format(type(optimizer).__name__, times))) as caught:
        scheduler.step()
    assert '"interval": "step"' in said(caught)[0]
    step(optimizer, times)
    scheduler.step()


def test_a_step_for_a_step_is_silent(optimizer):
    scheduler = schedule(optimizer)
    for _ in range(5):
        step(optimizer)
        scheduler.step()


def test_a_scheduler_that_joins_later_counts_from_there(optimizer):
    first = schedule(optimizer)
    step(optimizer)
    first.step()
    step(optimizer, 7)
    second = schedule(optimizer)
    step(optimizer)
    second.step()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_steps_without_one_of_the_optimizer_are_silent(optimizer):
    """As where a gradient scaler skips it."""
    scheduler = schedule(optimizer)
    for _ in range(3):
        scheduler.step()
    step(optimizer)
    scheduler.step()


def test_steps_that_do_not_count_are_silent(optimizer):
    module = nn.Module()
    module.params = nn.ParameterList(optimizer.param_groups[0]["params"])
    scheduler = schedule(optimizer)
    get_optimizer_state_dict(module, optimizer)
    optimizer.step()
    step(optimizer)
    scheduler.step()


@pytest.mark.parametrize("kind", [Lookahead, HookedLookahead, partial(SAM, base_optimizer=torch.optim.SGD)])
def test_a_step_of_an_optimizer_around_another_is_one(kind):
    params = [nn.Parameter(torch.ones(3))]
    optimizer = kind(params, lr=0.1) if isinstance(kind, partial) else kind(torch.optim.SGD(params, lr=0.1))
    scheduler = schedule(optimizer)
    for _ in range(4):
        backward(optimizer)
        optimizer.step(lambda: backward(optimizer))
        scheduler.step()
    for _ in range(2):
        backward(optimizer)
        optimizer.step(lambda: backward(optimizer))
    with pytest.warns(UserWarning, match=re.escape(SAID.format(type(optimizer).__name__, 2))):
        scheduler.step()


def test_several_evaluations_of_a_closure_are_one_step():
    optimizer = torch.optim.LBFGS([nn.Parameter(torch.ones(3))], lr=0.1, max_iter=4)
    scheduler = schedule(optimizer)
    for _ in range(3):
        optimizer.step(lambda: backward(optimizer))
        scheduler.step()


def test_an_optimizer_whose_steps_cannot_be_observed_is_left_alone():
    class Hidden(Bare, torch.optim.Optimizer):
        pass

    optimizer = Hidden([nn.Parameter(torch.ones(3))])
    scheduler = schedule(optimizer)
    step(optimizer, 5)
    scheduler.step()


@pytest.mark.parametrize("milestone", [1, 3])
def test_a_part_of_another_scheduler_is_silent(optimizer, milestone):
    sequential = SequentialLR(
        optimizer, [ConstantLR(optimizer, 0.5, milestone), schedule(optimizer)], milestones=[milestone]
    )
    for _ in range(milestone + 4):
        step(optimizer)
        sequential.step()
    chained = ChainedScheduler([schedule(optimizer), ConstantLR(optimizer, 0.5, 3)], optimizer)
    for _ in range(4):
        step(optimizer)
        chained.step()


def test_a_loaded_state_restarts_the_count_and_does_not_contain_it(optimizer):
    scheduler = schedule(optimizer)
    before = copy.deepcopy(scheduler.state_dict())
    assert not {"_steps_seen", "_has_warned"} & set(before)
    step(optimizer, 5)
    scheduler.load_state_dict(before)
    step(optimizer)
    scheduler.step()


@pytest.mark.parametrize("lr", [None, "absent"])
def test_an_optimizer_without_a_rate_is_refused_and_unchanged(lr):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))])
    (group,) = optimizer.param_groups
    del group["lr"]
    if lr is None:
        group["lr"] = None
    before = dict(group)
    said = "optimizer must be one with a number or a tensor as lr of every group .* got 'SGD with lr=None'"
    with pytest.raises(ValueError, match=said):
        schedule(optimizer)
    assert group == before


class Forgets(Walk):
    """Returns a scheduler as Lightning's documentation has it, and not how often it steps."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [schedule(optimizer)]


@pytest.mark.parametrize(("options", "steps"), [({"max_epochs": 1}, 12), ({"max_epochs": 3}, 12), ({}, 6)])
def test_a_scheduler_that_lightning_steps_by_the_epoch_is_pointed_out_once(tmp_path, options, steps):
    accumulated = BATCHES // steps
    with pytest.warns(UserWarning, match=re.escape(SAID.format("SGD", steps))) as caught:
        walk(tmp_path, Forgets(), accumulate_grad_batches=accumulated, **options)
    assert len(said(caught)) == 1


def test_the_stock_cli_points_it_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script.py"])
    arguments = ["--optimizer=SGD", "--lr_scheduler=lightning_lars.WarmupDecayLR", "--optimizer.lr=0.1"]
    arguments += ["--lr_scheduler.warmup_steps=4", "--lr_scheduler.total_steps=24", "--trainer.max_epochs=2"]
    arguments += ["--trainer.logger=false", "--trainer.accelerator=cpu", "--seed_everything=0"]
    arguments += ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]

    class Net(Walk):
        def __init__(self, width: int = 1):
            super().__init__()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`Net.configure_optimizers` will be overridden")
        cli = LightningCLI(Net, args=arguments, run=False)
    with pytest.warns(UserWarning, match=re.escape(SAID.format("SGD", BATCHES))) as caught:
        cli.trainer.fit(cli.model)
    assert len(said(caught)) == 1


@pytest.mark.parametrize(
    "callback",
    [
        lambda: LearningRateFinder(num_training_steps=20, update_attr=False),
        lambda: BatchSizeFinder(max_trials=2, steps_per_trial=3),
    ],
    ids=["rates", "batch sizes"],
)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_scheduler_that_lightning_steps_by_the_step_is_silent(tmp_path, callback, accumulated):
    walk(tmp_path, Walk(LARS, schedule), callback(), accumulate_grad_batches=accumulated)
