"""The mixin's schedule, and the length of the run that it gets."""

import math
from functools import partial

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.tuner import Tuner
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_lars import LAMB, LARS, WarmupDecayLR
from tests.support.boring import Boring, LogsLoss, trainer

SCHEDULE = partial(WarmupDecayLR, warmup_steps=2)


class Rated(Boring):
    """Keeps the rate of every batch."""

    def __init__(self, **kwargs):
        torch.manual_seed(0)
        super().__init__(optimizer=partial(LARS, lr=1.0), **kwargs)
        self.rates = []

    def on_train_batch_start(self, batch, batch_idx):
        self.rates.append(self.optimizers().optimizer.param_groups[0]["lr"])


class Unsaved(Rated):
    """Without hyperparameters, which a local function cannot be one of."""

    def save_hyperparameters(self, *_, **__):
        pass


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(4)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 8),
        ({"max_epochs": 3}, 24),
        ({"max_steps": 5}, 5),
        ({"limit_train_batches": 5}, 5),
        ({"limit_train_batches": 5, "accumulate_grad_batches": 2, "max_epochs": 2}, 6),
        pytest.param(
            {"callbacks": [GradientAccumulationScheduler({1: 4})], "max_epochs": 2},
            10,
            id="an accumulation that changes",
        ),
    ],
    ids=str,
)
def test_the_schedule_is_as_long_as_the_run(tmp_path, options, steps):
    module, fit = Rated(lr_scheduler=SCHEDULE), trainer(tmp_path, **options)
    fit.fit(module)
    assert fit.lr_scheduler_configs[0].scheduler.total_steps == steps == fit.global_step
    assert fit.lr_scheduler_configs[0].interval == "step"
    assert module.rates[0] == 0.5
    last = (1 + math.cos(math.pi * (steps - 3) / (steps - 2))) / 2
    assert module.rates[-1] == pytest.approx(last, rel=1e-12)


def test_a_length_that_was_given_stays(tmp_path):
    fit = trainer(tmp_path)
    fit.fit(Rated(lr_scheduler=partial(SCHEDULE, total_steps=100)))
    assert fit.lr_scheduler_configs[0].scheduler.total_steps == 100


def test_a_run_without_end_needs_a_length(tmp_path):
    class EndlessModule(Rated):
        def train_dataloader(self):
            return DataLoader(Endless(), batch_size=4)

    with pytest.raises(MisconfigurationException, match="WarmupDecayLR needs total_steps where the run has"):
        trainer(tmp_path).fit(EndlessModule(lr_scheduler=SCHEDULE))


def test_a_warmup_longer_than_the_run_raises(tmp_path):
    with pytest.raises(ValueError, match=r"warmup_steps must be below total_steps=8 .* got 8"):
        trainer(tmp_path).fit(Rated(lr_scheduler=partial(WarmupDecayLR, warmup_steps=8)))


def test_fast_dev_run_tries_a_schedule_that_is_longer(tmp_path):
    module = Rated(lr_scheduler=partial(WarmupDecayLR, warmup_steps=8))
    trainer(tmp_path, fast_dev_run=2).fit(module)
    assert module.rates == [1 / 8, 2 / 8]


@pytest.mark.parametrize(("interval", "steps"), [(None, 2), ("epoch", 2), ("step", 16)])
def test_other_schedulers_step_per_epoch_by_default(tmp_path, interval, steps):
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(Rated(lr_scheduler=partial(StepLR, step_size=5), lr_scheduler_interval=interval))
    assert fit.lr_scheduler_configs[0].scheduler.last_epoch == steps


def test_a_plateau_names_its_metric(tmp_path):
    class Plateau(LogsLoss, Rated):
        pass

    fit = trainer(tmp_path)
    fit.fit(Plateau(lr_scheduler=partial(ReduceLROnPlateau, monitor="loss")))
    assert fit.lr_scheduler_configs[0].monitor == "loss"


def test_warmup_decay_by_the_epoch_raises(tmp_path):
    with pytest.raises(ValueError, match='lr_scheduler_interval must be "step" with WarmupDecayLR'):
        trainer(tmp_path).fit(Rated(lr_scheduler=SCHEDULE, lr_scheduler_interval="epoch"))


def test_an_interval_without_a_scheduler_raises():
    with pytest.raises(
        ValueError, match="lr_scheduler_interval must be None without an lr_scheduler, got 'step'"
    ):
        Rated(lr_scheduler_interval="step")


def test_a_scheduler_that_cannot_be_called_raises():
    with pytest.raises(TypeError, match="lr_scheduler must be a scheduler class or a callable"):
        Rated(lr_scheduler="cosine")


@pytest.mark.parametrize("schedule", [SCHEDULE, partial(CosineAnnealingLR, T_max=3)])
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_schedule_is_the_schedule_that_never_stopped(tmp_path, schedule):
    class Module(Rated):
        def __init__(self):
            super().__init__(lr_scheduler=schedule)

    straight = Module()
    trainer(tmp_path, max_epochs=2).fit(straight)

    def with_checkpoints(folder):
        each_epoch = ModelCheckpoint(
            tmp_path / folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )
        return trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[each_epoch])

    with_checkpoints("first").fit(Module())
    resumed = Module()
    with_checkpoints("second").fit(resumed, ckpt_path=tmp_path / "first" / "epoch=0.ckpt")
    assert straight.rates[8:] == resumed.rates
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_run_in_its_stable_phase_is_cooled_down_from_a_checkpoint_to_another_end(tmp_path):
    stable = partial(SCHEDULE, decay="wsd", cooldown_steps=0)
    first = trainer(tmp_path, max_epochs=3, limit_train_batches=2)
    first.fit(Rated(lr_scheduler=partial(stable, total_steps=800)))
    first.save_checkpoint(tmp_path / "stable.ckpt")
    cooling = Rated(lr_scheduler=partial(SCHEDULE, decay="wsd", cooldown_steps=4))
    last = trainer(tmp_path, max_epochs=100, max_steps=11, limit_train_batches=2)
    last.fit(cooling, ckpt_path=tmp_path / "stable.ckpt")
    assert cooling.rates == [1.0, 1.0, 0.75, 0.5, 0.25]
    assert last.lr_scheduler_configs[0].scheduler.total_steps == 11


def test_one_cycle_moves_the_momentum_of_lamb(tmp_path):
    module = Boring(
        optimizer=partial(LAMB, lr=0.1),
        lr_scheduler=partial(WarmupDecayLR, warmup_steps=4, warmup="cosine", decay="one_cycle"),
    )
    fit = trainer(tmp_path)
    fit.fit(module)
    beta1, beta2 = fit.optimizers[0].param_groups[0]["betas"]
    assert beta1 == pytest.approx(0.95)
    assert beta2 == 0.999


def test_a_second_fit_gets_the_remaining_steps(tmp_path):
    fit = trainer(tmp_path)
    fit.fit(Rated(lr_scheduler=SCHEDULE))
    fit.fit_loop.max_epochs = 3
    fit.fit(Rated(lr_scheduler=SCHEDULE))
    assert fit.lr_scheduler_configs[0].scheduler.total_steps == 16


@pytest.mark.parametrize("options", [{}, {"max_steps": 5}, {"max_epochs": 0}, {"max_epochs": 3}], ids=str)
def test_a_second_fit_where_nothing_is_left_returns(tmp_path, options):
    fit = trainer(tmp_path, **options)
    for _ in range(2):
        fit.fit(Rated(lr_scheduler=partial(WarmupDecayLR, warmup_steps=4)))
        steps = fit.global_step
    assert (
        steps
        == {"max_steps": 5, "max_epochs": 8 * options.get("max_epochs", 1)}[next(iter(options), "max_epochs")]
    )


@pytest.mark.parametrize(
    ("first", "then", "steps"),
    [
        ({"max_steps": 3}, {"max_epochs": 3}, 16),
        ({"accumulate_grad_batches": 4}, {"max_epochs": 3, "accumulate_grad_batches": 1}, 16),
        ({"max_epochs": 2}, {"max_epochs": 4, "accumulate_grad_batches": 4}, 4),
    ],
    ids=str,
)
def test_a_second_fit_gets_the_steps_of_its_own_epochs(tmp_path, first, then, steps):
    fit = trainer(tmp_path, **first)
    fit.fit(Rated(lr_scheduler=partial(WarmupDecayLR, warmup_steps=1)))
    before = fit.global_step
    fit.fit_loop.epoch_loop.max_steps, fit.fit_loop.max_epochs = -1, then["max_epochs"]
    fit.accumulate_grad_batches = then.get("accumulate_grad_batches", 1)
    fit.fit(Rated(lr_scheduler=partial(WarmupDecayLR, warmup_steps=1)))
    assert fit.lr_scheduler_configs[0].scheduler.total_steps == steps == fit.global_step - before


@pytest.mark.parametrize("schedule", [SCHEDULE, partial(CosineAnnealingLR, T_max=3)])
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_second_fit_that_is_resumed_is_the_one_that_never_stopped(tmp_path, schedule):
    """In another Trainer, which knows nothing of a first one. Warnings are errors."""

    def with_checkpoints(folder, **options):
        each_epoch = ModelCheckpoint(
            tmp_path / folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )
        return trainer(tmp_path, enable_checkpointing=True, callbacks=[each_epoch], **options)

    straight, fit = Unsaved(lr_scheduler=schedule), with_checkpoints("straight")
    fit.fit(straight)
    fit.fit_loop.max_epochs = 4
    fit.fit(straight)
    resumed = Unsaved(lr_scheduler=schedule)
    with_checkpoints("resumed", max_epochs=4).fit(resumed, ckpt_path=tmp_path / "straight/epoch=2.ckpt")
    assert resumed.rates == straight.rates[3 * 8 :]
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_second_fit_that_is_extended_as_it_is_resumed_says_by_how_much(tmp_path):
    fit = trainer(tmp_path)
    fit.fit(Rated(lr_scheduler=SCHEDULE))
    fit.fit_loop.max_epochs = 3
    fit.fit(Rated(lr_scheduler=SCHEDULE))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"total_steps=16, which replaces 24: .* Call set_total_steps\(24\)"):
        trainer(tmp_path, max_epochs=4).fit(Rated(lr_scheduler=SCHEDULE), ckpt_path=tmp_path / "a.ckpt")


class Manual(Rated):
    """Steps every fourth batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 4 == 3:
            self.optimizers().step()
            self.optimizers().zero_grad()
            self.lr_schedulers().step()


def test_manual_optimization_needs_a_length(tmp_path):
    said = "WarmupDecayLR needs total_steps under manual optimization, where only the module knows how often"
    with pytest.raises(MisconfigurationException, match=said):
        trainer(tmp_path).fit(Manual(lr_scheduler=SCHEDULE))
    module = Manual(lr_scheduler=partial(SCHEDULE, total_steps=4))
    trainer(tmp_path, max_epochs=2).fit(module)
    assert sorted(set(module.rates)) == [0.5, 1.0]


def test_a_run_that_is_extended_says_that_its_schedule_is_not(tmp_path):
    first = trainer(tmp_path)
    first.fit(Rated(lr_scheduler=SCHEDULE))
    first.save_checkpoint(tmp_path / "a.ckpt")
    longer = trainer(tmp_path, max_epochs=2)
    with pytest.warns(UserWarning, match=r"total_steps=8, which replaces 16: .* Call set_total_steps\(16\)"):
        longer.fit(Rated(lr_scheduler=SCHEDULE), ckpt_path=tmp_path / "a.ckpt")


def test_a_batch_size_finder_after_the_schedule_was_built_is_pointed_out(tmp_path):
    class Resizable(Rated):
        batch_size = 2

        def train_dataloader(self):
            return DataLoader(torch.randn(32, 4), batch_size=self.batch_size)

    fit = trainer(tmp_path, callbacks=[BatchSizeFinder(max_trials=1)])
    with pytest.warns(UserWarning, match="total_steps=16 before BatchSizeFinder changes"):
        fit.fit(Resizable(lr_scheduler=SCHEDULE))


class Tunable(Rated):
    """Has a batch size to find, and no learning rate as an attribute."""

    batch_size = 2

    def train_dataloader(self):
        return DataLoader(torch.randn(32, 4), batch_size=self.batch_size)


def test_the_tuner_finds_a_batch_size_without_a_word(tmp_path):
    """Warnings are errors. The fit that follows is told its length."""
    module, fit = Tunable(lr_scheduler=SCHEDULE), trainer(tmp_path)
    found = Tuner(fit).scale_batch_size(module, max_trials=2, steps_per_trial=1, init_val=2)
    assert module.batch_size == found > 2
    fit.fit(module)
    assert fit.lr_scheduler_configs[0].scheduler.total_steps == 32 // found == fit.global_step


def test_the_tuner_finds_a_rate_for_an_optimizer_that_is_an_argument(tmp_path):
    module, fit = Tunable(lr_scheduler=SCHEDULE), trainer(tmp_path)
    with pytest.raises(AttributeError, match="should have one of these fields"):
        Tuner(fit).lr_find(module, num_training=10)
    fit = trainer(tmp_path)
    finder = Tuner(fit).lr_find(module, num_training=10, update_attr=False, early_stop_threshold=None)
    assert len(finder.results["lr"]) >= 10
    assert [group["lr"] for group in module.configure_optimizers()["optimizer"].param_groups] == [0.5, 0.5]


def test_a_schedule_inside_of_another_counts_steps_too(tmp_path):
    def chained(optimizer):
        return ChainedScheduler([WarmupDecayLR(optimizer, warmup_steps=2), ConstantLR(optimizer, 0.5, 3)])

    fit = trainer(tmp_path)
    fit.fit(Unsaved(lr_scheduler=chained))
    assert fit.lr_scheduler_configs[0].interval == "step"
    assert fit.lr_scheduler_configs[0].scheduler._schedulers[0].total_steps == 8


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"max_steps": 0}], ids=str)
def test_a_fit_without_steps_needs_no_length(tmp_path, options):
    fit = trainer(tmp_path, **options)
    fit.fit(Rated(lr_scheduler=SCHEDULE))
    assert fit.global_step == 0


def test_a_callable_that_returns_no_scheduler_raises(tmp_path):
    with pytest.raises(TypeError, match="lr_scheduler must return a scheduler, got <class"):
        trainer(tmp_path).fit(Rated(lr_scheduler=type))


def test_without_a_trainer_a_schedule_of_given_length_is_built():
    config = Rated(lr_scheduler=partial(SCHEDULE, total_steps=9)).configure_optimizers()["lr_scheduler"]
    assert config["scheduler"].total_steps == 9
    assert config["interval"] == "step"


def test_without_a_trainer_any_other_schedule_is_built():
    config = Rated(lr_scheduler=partial(StepLR, step_size=5)).configure_optimizers()["lr_scheduler"]
    assert type(config["scheduler"]) is StepLR
    assert config["interval"] == "epoch"


NO_TRAINER = "WarmupDecayLR needs total_steps without a Trainer, under Fabric or in a custom loop"


def test_without_a_trainer_a_schedule_without_length_is_refused():
    with pytest.raises(MisconfigurationException, match=NO_TRAINER):
        Rated(lr_scheduler=SCHEDULE).configure_optimizers()


@pytest.mark.parametrize("order", ["configured first", "set up first"])
def test_under_fabric_the_mixin_trains_on_its_schedule(order):
    fabric = Fabric(accelerator="cpu", devices=1)
    net = Rated(lr_scheduler=partial(SCHEDULE, total_steps=4, decay="constant"))
    if order == "configured first":
        config = net.configure_optimizers()
        module, optimizer = fabric.setup(net, config["optimizer"])
    else:
        module = fabric.setup(net)
        config = net.configure_optimizers()
        optimizer = fabric.setup_optimizers(config["optimizer"])
    rates, scheduler = [], config["lr_scheduler"]["scheduler"]
    before = net.net[0].weight.detach().clone()
    for _ in range(4):
        fabric.backward(module.net(torch.randn(4, 4)).pow(2).mean())
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert rates == [0.5, 1.0, 1.0, 1.0]
    assert not torch.equal(before, net.net[0].weight)
    assert [group["name"] for group in optimizer.param_groups] == ["adapted", "excluded"]
    assert optimizer.param_groups[0]["param_names"] == ["net.0.weight", "net.2.weight"]


def test_under_fabric_a_schedule_without_length_is_refused():
    net = Rated(lr_scheduler=SCHEDULE)
    Fabric(accelerator="cpu", devices=1).setup(net)
    with pytest.raises(MisconfigurationException, match=NO_TRAINER):
        net.configure_optimizers()
