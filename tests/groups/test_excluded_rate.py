"""A separate learning rate for excluded parameters, through every entry point and under every schedule."""

import sys
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import lr_scheduler

from lightning_lars import (
    LAMB,
    LARS,
    BatchSizeScaling,
    ExcludeNormAndBias,
    LargeBatchMixin,
    LearningRateWarmup,
    WarmupDecayLR,
    build_optimizer,
    recipes,
)
from lightning_lars.cli import LargeBatchCLI
from tests.support.boring import Boring, boring, trainer
from tests.support.checkpoints import safely

LR, EXCLUDED_LR = 0.5, 0.02
STEPS = 8

# Each acts in the same way on every group, so that excluded_lr is the peak of the excluded one.
SCHEDULERS = {
    "none": None,
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "multi step": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, LR, total_steps=9),
    "three phases": lambda o: lr_scheduler.OneCycleLR(o, LR, total_steps=9, three_phase=True),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, LR, step_size_up=3, mode="triangular2"),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "warmup and decay": lambda o: WarmupDecayLR(o, warmup_steps=3, total_steps=STEPS),
}


class Recording(LargeBatchMixin, LightningModule):
    """Notes the rates that stand in the groups at every step, and those inside of the step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    training_step = Boring.training_step
    train_dataloader = Boring.train_dataloader

    def on_train_start(self):
        self.rates, self.in_step = [], []
        optimizer = self.optimizers().optimizer
        optimizer.register_step_pre_hook(lambda o, *_: self.in_step.append(rates_of(o)))

    def on_train_batch_start(self, batch, batch_idx):
        self.rates.append(rates_of(self.optimizers().optimizer))


class Bare(Recording):
    """Hands the optimizer bare parameters, for the callback to regroup."""

    def __init__(self, scheduler=None, lr=LR):
        super().__init__()
        self.schedule, self.lr = scheduler, lr

    def configure_optimizers(self):
        optimizer = LARS(self.parameters(), lr=self.lr)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def rates_of(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def by_mixin(scheduler, **rate):
    options = {} if scheduler is None else {"lr_scheduler": scheduler, "lr_scheduler_interval": "step"}
    return Recording(optimizer=partial(LARS, lr=LR), **options, **rate), []


def by_callback(scheduler, **rate):
    return Bare(scheduler), [ExcludeNormAndBias(**rate)]


def fit(tmp_path, module, *callbacks, **options):
    trainer(tmp_path, callbacks=list(callbacks), **options).fit(module)
    return module


@pytest.mark.parametrize("door", [by_mixin, by_callback])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rate", [{"excluded_lr": EXCLUDED_LR}, {"excluded_lr_scale": EXCLUDED_LR / LR}])
def test_the_excluded_group_follows_the_schedule_below_its_own_rate(tmp_path, door, name, rate):
    plain, callbacks = door(SCHEDULERS[name])
    expected = [adapted for adapted, _ in fit(tmp_path, plain, *callbacks).rates]
    module, callbacks = door(SCHEDULERS[name], **rate)
    rates = fit(tmp_path, module, *callbacks).rates
    assert [adapted for adapted, _ in rates] == expected
    share = EXCLUDED_LR / LR
    assert [excluded for _, excluded in rates] == pytest.approx([share * each for each in expected])
    assert len(rates) == STEPS
    assert name == "none" or len(set(expected)) > 1


@pytest.mark.parametrize("lr", [LR, torch.tensor(LR)], ids=["float", "tensor"])
def test_build_optimizer_sets_the_rate_whatever_lr_is(lr):
    adapted, excluded = build_optimizer(nn.Linear(2, 2), LARS, lr=lr, excluded_lr=0.02).param_groups
    assert float(adapted["lr"]) == LR
    assert float(excluded["lr"]) == pytest.approx(0.02)
    assert type(excluded["lr"]) is type(lr)
    assert float(lr) == LR
    assert ("batch_size_scaling" in adapted, excluded["batch_size_scaling"]) == (False, False)


@pytest.mark.parametrize("optimizer", [LARS, LAMB, torch.optim.SGD, torch.optim.AdamW])
def test_a_step_moves_excluded_parameters_at_their_separate_rate(optimizer):
    torch.manual_seed(0)
    module = nn.Linear(2, 1)
    built = build_optimizer(module, optimizer, lr=1.0, excluded_lr=0.25)
    bias = module.bias.detach().clone()
    module.bias.grad = torch.ones(1)
    module.weight.grad = torch.ones(1, 2)
    built.step()
    assert (bias - module.bias.detach()).item() == pytest.approx(0.25, rel=1e-5)


DOORS = [
    lambda **rate: build_optimizer(nn.Linear(2, 2), LARS, lr=1.0, **rate),
    lambda **rate: Boring(**rate),
    lambda **rate: ExcludeNormAndBias(**rate),
]


@pytest.mark.parametrize("door", DOORS, ids=["build_optimizer", "mixin", "callback"])
def test_both_ways_to_set_the_rate_exclude_each_other(door):
    with pytest.raises(ValueError, match=r"excluded_lr must be None with excluded_lr_scale=0\.5"):
        door(excluded_lr=0.1, excluded_lr_scale=0.5)


@pytest.mark.parametrize("door", DOORS, ids=["build_optimizer", "mixin", "callback"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "a", True])
def test_a_rate_out_of_range_raises(door, value):
    with pytest.raises(ValueError, match=f"excluded_lr must be above 0 and finite, got {value!r}"):
        door(excluded_lr=value)


def test_a_rate_without_effect_raises():
    with pytest.raises(ValueError, match=r"excluded_lr must be None where no parameter is excluded, got 0.1"):
        build_optimizer(nn.Linear(2, 2, bias=False), LARS, excluded_lr=0.1)


def test_a_recipe_for_a_model_without_norms_and_biases_says_how_to_go_on():
    class Unbiased(LargeBatchMixin, LightningModule):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.layer = nn.Linear(2, 2, bias=False)

    recipe = {**recipes.lamb(64), "lr_scheduler": None}
    with pytest.raises(ValueError, match="would have no effect: remove it, from a recipe with") as caught:
        Unbiased(**recipe).configure_optimizers()
    change = eval(str(caught.value).rpartition(" | ")[2])
    (group,) = Unbiased(**recipe | change).configure_optimizers().param_groups
    assert group["param_names"] == ["layer.weight"]


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("scheduler", ["StepLR", "OneCycleLR"])
def test_the_command_line_takes_the_rate(tmp_path, scheduler):
    steps = {"StepLR": ["--lr_scheduler.step_size=4"],
             "OneCycleLR": ["--lr_scheduler.max_lr=0.5", "--lr_scheduler.total_steps=9"]}  # fmt: skip
    arguments = ["--optimizer=lightning_lars.LARS", f"--optimizer.lr={LR}", "--trainer.logger=false"]
    arguments += [f"--lr_scheduler=torch.optim.lr_scheduler.{scheduler}", *steps[scheduler]]
    arguments += ["--param_groups.excluded_lr=0.02", "--trainer.accelerator=cpu", "--seed_everything=0"]
    arguments += [
        "--lr_scheduler_interval=step",
        "--trainer.fast_dev_run=2",
        "--trainer.enable_progress_bar=false",
    ]
    cli = LargeBatchCLI(Plain, args=arguments, run=False)
    cli.trainer.fit(cli.model)
    adapted, excluded = cli.trainer.optimizers[0].param_groups
    assert excluded["lr"] / adapted["lr"] == pytest.approx(0.02 / LR)


class Plain(LightningModule):
    """Says nothing of its optimizer."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.net = nn.Linear(4, width)

    training_step = Boring.training_step
    train_dataloader = Boring.train_dataloader


@pytest.fixture
def _alone(monkeypatch):
    """The CLI warns of arguments that are given beside those of the process."""
    monkeypatch.setattr(sys, "argv", ["script.py"])


ONE_RATE = {
    "decays to one rate": (
        partial(lr_scheduler.CosineAnnealingLR, T_max=8, eta_min=0.1),
        "CosineAnnealingLR must end below .* which is .* with excluded_lr=0.02, got eta_min=0.1",
    ),
    "decays to one rate inside": (
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.CosineAnnealingLR(o, 8, 0.1)]),
        "CosineAnnealingLR must end below .* which is .* with excluded_lr=0.02, got eta_min=0.1",
    ),
    "averages at one rate": (
        partial(torch.optim.swa_utils.SWALR, swa_lr=0.1),
        "swa_lr must have a rate for each group with excluded_lr=0.02, got 0.1",
    ),
}


@pytest.mark.parametrize("door", [by_mixin, by_callback])
@pytest.mark.parametrize("case", ONE_RATE)
def test_a_schedule_that_would_raise_the_excluded_group_is_refused(tmp_path, door, case):
    scheduler, message = ONE_RATE[case]
    module, callbacks = door(scheduler, excluded_lr=EXCLUDED_LR)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, *callbacks)


def test_rates_for_each_group_must_agree(tmp_path):
    module, _ = by_mixin(
        partial(lr_scheduler.OneCycleLR, max_lr=[0.5, 0.3], total_steps=9), excluded_lr=EXCLUDED_LR
    )
    with pytest.raises(ValueError, match=r"excluded_lr=0.02 and the rates of OneCycleLR must agree, got 0.3"):
        fit(tmp_path, module)
    scheduler = partial(lr_scheduler.OneCycleLR, max_lr=[0.5, EXCLUDED_LR], total_steps=9)
    module, _ = by_mixin(scheduler, excluded_lr=EXCLUDED_LR)
    assert fit(tmp_path, module).rates[0] == pytest.approx([0.5 / 25, EXCLUDED_LR / 25])


class OneRateForAll:
    """A scheduler that inherits nothing and writes one rate into all groups."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.step()

    def step(self, *_):
        for group in self.optimizer.param_groups:
            group["lr"] = 0.3

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class OneMinimumForAll(lr_scheduler.LRScheduler):
    """As the published warm restarts with warmup: between two rates, whatever those of the groups are."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = 0.001

    def get_lr(self):
        return [0.001 + 0.1 * self.last_epoch for _ in self.base_lrs]


BY_CALLBACK = "ExcludeNormAndBias can give excluded parameters a separate rate only under torch's schedulers"


@pytest.mark.parametrize(
    ("door", "scheduler", "error", "message"),
    [
        (by_mixin, OneRateForAll, ValueError, "excluded_lr=0.02 must not be set with OneRateForAll, which"),
        (by_mixin, OneMinimumForAll, ValueError, "excluded_lr=0.02 must not be set with OneMinimumForAll"),
        (by_callback, OneRateForAll, MisconfigurationException, BY_CALLBACK),
        (by_callback, OneMinimumForAll, MisconfigurationException, BY_CALLBACK),
    ],
)
def test_a_scheduler_that_knows_one_rate_is_refused(tmp_path, door, scheduler, error, message):
    module, callbacks = door(scheduler, excluded_lr=EXCLUDED_LR)
    module.lr_scheduler_step = lambda scheduler, metric: scheduler.step()
    with pytest.raises(error, match=message):
        fit(tmp_path, module, *callbacks)


SCALED = {"rule": "linear", "base_batch_size": 2}


@pytest.mark.parametrize("door", [by_mixin, by_callback])
def test_batch_size_scaling_leaves_the_rate_alone_and_says_so(tmp_path, caplog, door):
    module, callbacks = door(None, excluded_lr=EXCLUDED_LR)
    with caplog.at_level("INFO"):
        fit(tmp_path, module, *callbacks, BatchSizeScaling(**SCALED))
    assert module.in_step == [[2 * LR, EXCLUDED_LR]] * STEPS
    (said,) = [record.message for record in caplog.records if "BatchSizeScaling" in record.message]
    assert "LARS/adapted 0.5 -> 1" in said
    assert "LARS/excluded 0.02, a separate rate, not scaled: scale_excluded=True scales it too" in said


def test_batch_size_scaling_scales_the_rate_when_it_is_asked_to(tmp_path):
    module, _ = by_mixin(None, excluded_lr=EXCLUDED_LR)
    fit(tmp_path, module, BatchSizeScaling(**SCALED, scale_excluded=True))
    assert module.in_step == [[2 * LR, 2 * EXCLUDED_LR]] * STEPS


def test_batch_size_scaling_scales_a_share_of_the_others_rate(tmp_path):
    module, _ = by_mixin(None, excluded_lr_scale=0.1)
    fit(tmp_path, module, BatchSizeScaling(**SCALED))
    assert module.in_step == [pytest.approx([2 * LR, 0.2 * LR])] * STEPS


def test_batch_size_scaling_leaves_the_betas_of_such_a_group_alone(tmp_path):
    seen = []

    class Betas(Boring):
        def on_train_start(self):
            hook = lambda o, *_: seen.append([group["betas"] for group in o.param_groups])  # noqa: E731
            self.optimizers().optimizer.register_step_pre_hook(hook)

    module = Betas(optimizer=partial(torch.optim.AdamW, lr=0.1, betas=(0.9, 0.99)), excluded_lr=0.01)
    fit(tmp_path, module, BatchSizeScaling(2, "adam_sqrt"), max_steps=1)
    assert seen == [[pytest.approx((0.8, 0.98)), (0.9, 0.99)]]


def test_asking_for_groups_that_are_scaled_anyway_warns(tmp_path):
    module, _ = by_mixin(None)
    with pytest.warns(UserWarning, match=r"BatchSizeScaling\(scale_excluded=True\) has no effect"):
        fit(tmp_path, module, BatchSizeScaling(**SCALED, scale_excluded=True))
    with pytest.raises(ValueError, match="scale_excluded must be True or False, got 'yes'"):
        BatchSizeScaling(scale_excluded="yes")


@pytest.mark.parametrize("door", [by_mixin, by_callback])
def test_warmup_acts_on_the_rate(tmp_path, door):
    module, callbacks = door(None, excluded_lr=EXCLUDED_LR)
    fit(tmp_path, module, *callbacks, LearningRateWarmup(warmup_steps=4))
    factors = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert module.in_step == [pytest.approx([LR * each, EXCLUDED_LR * each]) for each in factors]


@pytest.mark.parametrize("door", [by_mixin, by_callback])
def test_a_resumed_run_keeps_rate_and_mark(tmp_path, door):
    scheduler = SCHEDULERS["one cycle"]
    options = {"max_epochs": 2, "limit_train_batches": 4}
    module, callbacks = door(scheduler, excluded_lr=EXCLUDED_LR)
    straight = fit(tmp_path, module, *callbacks, BatchSizeScaling(**SCALED), **options)
    module, callbacks = door(scheduler, excluded_lr=EXCLUDED_LR)
    first = trainer(
        tmp_path, callbacks=[*callbacks, BatchSizeScaling(**SCALED)], **{**options, "max_epochs": 1}
    )
    first.fit(module)
    first.save_checkpoint(tmp_path / "a.ckpt")
    module, callbacks = door(scheduler, excluded_lr=EXCLUDED_LR)
    again = trainer(tmp_path, callbacks=[*callbacks, BatchSizeScaling(**SCALED)], **options)
    again.fit(module, ckpt_path=tmp_path / "a.ckpt")
    assert module.in_step == straight.in_step[4:]
    assert [excluded for _, excluded in module.in_step] == [excluded for _, excluded in module.rates]


def test_a_rate_of_0_under_a_scheduler_cannot_be_followed(tmp_path):
    module = Bare(SCHEDULERS["linear"], lr=0.0)
    with pytest.raises(ValueError, match="lr must be above 0 under a scheduler where excluded"):
        fit(tmp_path, module, ExcludeNormAndBias(excluded_lr=EXCLUDED_LR))


def test_the_mixin_saves_the_rate_as_a_hyperparameter(tmp_path):
    module = boring(excluded_lr=EXCLUDED_LR)
    fit_ = trainer(tmp_path)
    fit_.fit(module)
    fit_.save_checkpoint(tmp_path / "a.ckpt")
    loaded = safely(Boring.load_from_checkpoint, tmp_path / "a.ckpt")
    assert loaded.configure_optimizers().param_groups[1]["lr"] == EXCLUDED_LR
