"""Short runs of several kinds of modules, what they report, and what they leave as it was."""

import contextlib
import copy
import io
import math
import os
import random
from functools import partial

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import rich
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_lars import (
    LARS,
    BatchSizeScaling,
    BatchSizeSchedule,
    LearningRateWarmup,
    ParamGroupSummary,
    TrustRatioMonitor,
    WarmupDecayLR,
    advise,
)
from lightning_lars.advice.report import Advice
from tests.support.boring import Boring, Plain, WithoutOptimizer, boring, trainer
from tests.support.ranks import on_ranks
from tests.workers.advise import on_this_rank
from tests.workers.noise_scale import (
    B_SIMPLE,
    CLOSED_FORM,
    SQUARED_GRADIENT,
    TR_SIGMA,
    Linear,
    Module,
    samples,
)


class WithAdam(Plain):
    """With the optimizer of many modules, and dropout, which draws random numbers."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def training_step(self, batch, batch_idx):
        return super().training_step(self.dropout(batch), batch_idx)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class OwnBatches(WithAdam):
    """Its batches are dicts, from a loader without a batch size."""

    def train_dataloader(self):
        batches = [{"numbers": torch.randn(3, 4), "more": {"mask": torch.ones(3)}} for _ in range(12)]
        return DataLoader(batches, batch_size=None)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["numbers"], batch_idx)


class Manual(WithAdam):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


def values(model):
    return copy.deepcopy(model.state_dict())


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=0.0, atol=0.0)


def random_numbers():
    """Draw from every global generator."""
    return torch.rand(1).item(), float(np.random.rand()), random.random()


def test_reports_the_noise_scale_within_its_error(tmp_path):
    model = Module(data=samples(16 * 400), batch_size=16)
    advice = advise(model, trainer=trainer(tmp_path), max_steps=120)
    critical = advice.critical
    assert abs(critical.b_simple - B_SIMPLE) < 3 * critical.standard_error < B_SIMPLE
    assert critical.tr_sigma == pytest.approx(TR_SIGMA, rel=0.15)
    assert critical.squared_gradient == pytest.approx(SQUARED_GRADIENT, rel=0.5)
    assert (advice.batch_size, critical.batch_size) == (16, 32)
    assert [step for step, _ in critical.history] == [*range(10, 121, 10)]
    assert critical.history[-1] == (120, critical.b_simple)
    sizes = [16 * 2**k for k in range(5)]
    closest = min(sizes, key=lambda size: abs(math.log(size / critical.b_simple)))
    assert [each.batch_size for each in advice.batch_sizes] == sizes
    assert advice.suggested_batch_size == closest
    assert (advice.measured_steps, advice.steps) == (120, 400)
    at_twice = advice.batch_sizes[1]
    expected = (1 + critical.b_simple / 32) / (1 + critical.b_simple / 16)
    assert at_twice.steps_factor == pytest.approx(expected)
    assert at_twice.samples_factor == pytest.approx(2 * expected)
    assert (at_twice.steps, at_twice.samples) == (round(400 * expected), 32 * round(400 * expected))


@pytest.mark.parametrize(
    ("make", "optimizer", "batch_size", "steps", "lr"),
    [
        (WithAdam, "Adam", 4, 24, 0.01),
        (partial(boring, partial(LARS, lr=2.0), excluded_lr=0.05), "LARS", 4, 24, 2.0),
        (OwnBatches, "Adam", 3, 36, 0.01),
    ],
)
def test_takes_a_module_of_any_kind(tmp_path, make, optimizer, batch_size, steps, lr):
    advice = advise(make(), trainer=trainer(tmp_path, max_epochs=3), max_steps=6)
    assert (advice.optimizer, advice.batch_size, advice.steps) == (optimizer, batch_size, steps)
    assert (advice.measured_steps, advice.critical.batch_size) == (6, 2 * batch_size)
    assert advice.batch_sizes[2].batch_size == 4 * batch_size
    assert advice.batch_sizes[2].lr_sqrt == pytest.approx(2 * lr)
    assert advice.batch_sizes[2].lr_linear == (4 * lr if optimizer == "LARS" else None)
    # Two moments and a count, or momentum, of the 29 numbers in 6 tensors.
    held = {"Adam": 29 * 8 + 6 * 4, "LARS": 29 * 4}[optimizer]
    assert advice.state_bytes[optimizer] == held
    assert next(iter(advice.state_bytes)) == optimizer
    assert advice.parameter_bytes == 29 * 4


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
@pytest.mark.parametrize("train_copy", [True, False])
def test_leaves_module_trainer_files_and_random_numbers_as_they_were(tmp_path, monkeypatch, train_copy):
    monkeypatch.chdir(tmp_path)
    callbacks = [EarlyStopping("accuracy"), ModelCheckpoint(monitor="accuracy"), LearningRateMonitor()]
    callbacks += [TrustRatioMonitor(picture="picture.png"), ParamGroupSummary()]
    options = {"callbacks": callbacks, "logger": CSVLogger("."), "enable_checkpointing": True}
    fitting = trainer(tmp_path, **options)
    held = list(fitting.callbacks), list(fitting.loggers)
    model, same = boring(), boring()
    model.net[1].eval()
    before = values(model)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    drawn = random_numbers()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    advice = advise(model, trainer=fitting, max_steps=3, train_copy=train_copy)
    assert random_numbers() == drawn
    assert advice.measured_steps == 3
    assert_same(values(model), before)
    assert [module.training for module in model.net] == [True, False, True]
    assert all(p.grad is None for p in model.parameters())
    assert model._trainer is None
    assert (fitting.callbacks, fitting.loggers) == held
    assert (fitting.global_step, fitting.should_stop, fitting.accumulate_grad_batches) == (0, False, 1)
    assert os.listdir(tmp_path) == []
    model.net[1].train()
    trainer(tmp_path).fit(model)
    trainer(tmp_path).fit(same)
    assert_same(values(model), values(same))


def test_the_trainer_fits_afterwards_as_if_there_had_been_no_advice(tmp_path):
    ends = []
    for is_advised in (True, False):
        fitting, model = trainer(tmp_path, callbacks=[LearningRateWarmup(warmup_steps=4)]), boring()
        if is_advised:
            advise(model, trainer=fitting, max_steps=2)
        fitting.fit(model)
        ends.append(values(model))
        assert fitting.global_step == 8
    assert_same(*ends)


@pytest.mark.parametrize("train_copy", [True, False])
def test_a_failed_run_leaves_the_module_as_it_was(tmp_path, train_copy):
    class Failing(WithAdam):
        def training_step(self, batch, batch_idx):
            if batch_idx == 4:
                raise RuntimeError("no more")
            return super().training_step(batch, batch_idx)

    model = Failing()
    before, drawn = values(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no more"):
        advise(model, trainer=trainer(tmp_path), train_copy=train_copy)
    assert_same(values(model), before)
    assert_same(torch.get_rng_state(), drawn)
    assert model._trainer is None


def test_is_determined_by_the_global_seed_and_repeats_itself(tmp_path):
    model = WithAdam()
    first, second = (advise(model, trainer=trainer(tmp_path), max_steps=4) for _ in range(2))
    assert first == second
    torch.manual_seed(1)
    assert advise(model, trainer=trainer(tmp_path), max_steps=4) != first


def test_counts_what_the_trainer_accumulates_itself(tmp_path):
    advice = advise(WithAdam(), trainer=trainer(tmp_path, accumulate_grad_batches=4), max_steps=2)
    assert (advice.batch_size, advice.critical.batch_size, advice.steps) == (16, 16, 2)
    assert not any("by accumulation" in sentence for sentence in advice.unknown)


@pytest.mark.parametrize(
    ("callback", "batch_size", "base"),
    [
        (GradientAccumulationScheduler({0: 2}), 8, 8),
        (BatchSizeSchedule({0: 8}), 8, 8),
        (BatchSizeScaling(base_batch_size=1), 4, 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_callbacks_that_change_a_step_take_part(tmp_path, callback, batch_size, base):
    advice = advise(WithAdam(), trainer=trainer(tmp_path, callbacks=[callback]), max_steps=2)
    assert (advice.batch_size, advice.base_batch_size) == (batch_size, base)
    assert advice.batch_sizes[0].lr_sqrt == pytest.approx(0.01 * (batch_size / base) ** 0.5)
    assert advice.critical.batch_size == 8


def test_says_whose_rate_is_shown_where_groups_differ(tmp_path):
    class Groups(WithAdam):
        def configure_optimizers(self):
            small, _, large = self.net
            groups = [{"params": small.parameters(), "lr": 0.5}, {"params": large.parameters(), "lr": 0.02}]
            groups[0]["name"], groups[1]["name"] = "small", "large"
            excluded = {"params": self.net[1].parameters(), "name": "excluded"}
            return torch.optim.Adam([*groups, excluded], lr=3.0)

    model = Groups()
    model.net[2] = nn.Linear(3, 20)
    advice = advise(model, trainer=trainer(tmp_path), max_steps=2)
    assert advice.batch_sizes[0].lr_sqrt == 0.02
    assert "The one shown is that of large, the largest group" in advice.unknown[0]
    same = advise(boring(excluded_lr=0.05), trainer=trainer(tmp_path), max_steps=0)
    assert not any("different learning rates" in each for each in same.unknown)


def test_the_schedule_is_that_of_the_whole_run(tmp_path):
    model = boring(lr_scheduler=partial(WarmupDecayLR, warmup_steps=6))
    warming = advise(model, trainer=trainer(tmp_path, max_epochs=5), max_steps=4)
    assert any("had not reached its peak" in sentence for sentence in warming.unknown)
    assert warming.batch_sizes[0].lr_sqrt == 1.0
    warm = advise(model, trainer=trainer(tmp_path, max_epochs=5), max_steps=9)
    assert not any("had not reached its peak" in sentence for sentence in warm.unknown)


def test_accumulation_on_one_device_does_not_shorten_the_schedule(tmp_path):
    lengths = []

    class Scheduled(WithAdam):
        def configure_optimizers(self):
            lengths.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    advice = advise(Scheduled(), trainer=trainer(tmp_path, max_epochs=5), max_steps=2)
    assert lengths == [40]
    assert (advice.steps, advice.critical.batch_size) == (40, 8)


def test_goes_on_from_a_checkpoint(tmp_path):
    fitting, model = trainer(tmp_path, max_epochs=2), boring()
    fitting.fit(model)
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((trainer.global_step, values(pl_module)))

    watch = Watch()
    # A deep copy of the callback would append to a copy of the list.
    Watch.__deepcopy__ = lambda self, memo: self
    advice = advise(
        boring(),
        trainer=trainer(tmp_path, max_epochs=4, callbacks=[watch]),
        max_steps=2,
        ckpt_path=tmp_path / "last.ckpt",
    )
    assert (advice.measured_steps, advice.steps) == (2, 32)
    step, first = seen[0]
    assert step == 16
    assert any("from step 16 on" in sentence for sentence in advice.unknown)
    assert not any("first steps of the run" in sentence for sentence in advice.unknown)
    assert_same(first, values(model))


def test_schedulers_and_callbacks_of_the_module_that_need_validation_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Validated(WithAdam):
        def configure_callbacks(self):
            return [ModelCheckpoint(), EarlyStopping("accuracy")]

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "accuracy"},
            }

        def validation_step(self, batch, batch_idx):
            raise AssertionError("there is no validation")

        def val_dataloader(self):
            return self.train_dataloader()

    # More than an epoch of the copy, which accumulates, and which asks for more epochs.
    fitting = trainer(tmp_path, max_epochs=3, min_epochs=2)
    assert advise(Validated(), trainer=fitting, max_steps=6).measured_steps == 6
    assert os.listdir(tmp_path) == []


def test_says_where_the_run_was_short_or_measured_nothing(tmp_path):
    short = advise(WithAdam(), trainer=trainer(tmp_path), max_steps=100)
    assert short.measured_steps == 4
    assert "The run ended after 4 of 100 steps." in short.unknown
    assert "4 steps: few for a noise scale. Raise max_steps." in short.unknown
    fitting = trainer(tmp_path, limit_train_batches=1)
    with pytest.warns(UserWarning, match="GradientNoiseScale measured no step"):
        nothing = advise(WithAdam(), trainer=fitting, max_steps=2)
    assert (nothing.critical, nothing.suggested_batch_size) == (None, None)
    assert nothing.batch_sizes[0].steps_factor is None
    assert "of 1 step, none had finite gradients" in nothing.unknown[0]
    assert "give the train loader two full batches or more in an epoch" in nothing.unknown[0]
    assert Advice.from_json(nothing.to_json()) == nothing


@pytest.mark.parametrize("make", [WithAdam, Manual, boring])
def test_without_a_step_it_reports_what_needs_no_training(tmp_path, make):
    class Untrained(make if isinstance(make, type) else Boring):
        def training_step(self, batch, batch_idx):
            raise AssertionError("no step is taken")

    advice = advise(Untrained(), trainer=trainer(tmp_path), max_steps=0)
    assert (advice.critical, advice.measured_steps, advice.batch_size) == (None, 0, 4)
    assert sum(group.elements for group in advice.groups) == 29
    assert set(advice.state_bytes) == {"LARS", "LAMB", "LARS8bit", "LAMB8bit"}
    assert "The critical batch size was not measured: max_steps=0." in advice.unknown


@pytest.mark.parametrize(
    ("make", "max_steps", "message"),
    [
        (Manual, 5, r"manual optimization.* Or pass max_steps=0, which reports everything else"),
        (WithoutOptimizer, 5, "got no optimizer.* Or pass max_steps=0"),
        (WithoutOptimizer, 0, "advise reads the parameter groups of an optimizer, got none: return one from"),
    ],
)
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_refuses_what_cannot_be_measured_and_says_what_to_do(tmp_path, make, max_steps, message):
    with pytest.raises(MisconfigurationException, match=message):
        advise(make(), trainer=trainer(tmp_path), max_steps=max_steps)


class Opaque:
    def __init__(self, numbers):
        self.numbers = numbers


class OpaqueBatches(OwnBatches):
    """Batches that do not show their size."""

    def train_dataloader(self):
        return DataLoader([Opaque(torch.randn(5, 4)) for _ in range(8)], batch_size=None)

    def training_step(self, batch, batch_idx):
        return super().training_step({"numbers": batch.numbers}, batch_idx)


def test_a_batch_size_that_nothing_shows_must_be_given(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"neither in the train loader nor .*pass"):
        advise(OpaqueBatches(), trainer=trainer(tmp_path), max_steps=2)
    with pytest.raises(ValueError, match="batch_size must be given where the train loader has none"):
        advise(OpaqueBatches(), trainer=trainer(tmp_path), max_steps=0)
    advice = advise(OpaqueBatches(), trainer=trainer(tmp_path), max_steps=2, batch_size=5)
    assert (advice.batch_size, advice.critical.batch_size) == (5, 10)


def test_refuses_a_trainer_that_has_run_or_takes_too_few_steps_or_starts_processes(tmp_path):
    ran = trainer(tmp_path)
    ran.fit(WithAdam())
    with pytest.raises(ValueError, match=r"trainer must not have run yet.*pass a new Trainer"):
        advise(WithAdam(), trainer=ran)
    with pytest.raises(ValueError, match="fast_dev_run=True: remove it"):
        advise(WithAdam(), trainer=trainer(tmp_path, fast_dev_run=True))
    with pytest.raises(ValueError, match=r"ddp_spawn.*use devices=1"):
        advise(WithAdam(), trainer=trainer(tmp_path, strategy="ddp_spawn"))


@pytest.mark.parametrize(
    ("argument", "value", "kind"),
    [
        ("model", nn.Linear(2, 2), "LightningModule"),
        ("model", WithAdam, "LightningModule"),
        ("trainer", 3, "Trainer"),
    ],
    ids=["module", "class", "number"],
)
def test_refuses_what_is_no_module_or_trainer(argument, value, kind):
    with pytest.raises(TypeError, match=f"^{argument} must be a {kind}, got"):
        advise(**{"model": WithAdam(), argument: value})


def test_takes_compiled_modules_and_those_that_are_made_when_they_are_configured(tmp_path):
    class Late(WithAdam):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = nn.Linear(4, 2)

    late = Late()
    for model in (late, torch.compile(WithAdam(), backend="eager")):
        assert advise(model, trainer=trainer(tmp_path), max_steps=2).measured_steps == 2
    assert not hasattr(late, "net")
    assert advise(late, trainer=trainer(tmp_path), max_steps=2, train_copy=False).measured_steps == 2


def test_an_optimizer_without_a_learning_rate_gets_none(tmp_path):
    class Mine(torch.optim.Optimizer):
        def step(self, closure=None):
            return closure()

    class WithMine(WithAdam):
        def configure_optimizers(self):
            return Mine(self.parameters(), {})

    advice = advise(WithMine(), trainer=trainer(tmp_path), max_steps=2)
    assert (advice.optimizer, advice.measured_steps, advice.groups[0].lr) == ("Mine", 2, None)
    assert {(row.lr_sqrt, row.lr_linear) for row in advice.batch_sizes} == {(None, None)}
    assert Advice.from_json(advice.to_json()) == advice
    advice.print()


@pytest.mark.filterwarnings("ignore:`Trainer.limit_train_batches=0`")
@pytest.mark.filterwarnings("ignore:.*The checkpoint.*")
def test_refuses_a_run_without_a_step(tmp_path):
    for options in ({"limit_train_batches": 0}, {"max_steps": 0}, {"max_epochs": 0}):
        for max_steps in (0, 9) if "limit_train_batches" in options else (9,):
            with pytest.raises(ValueError, match="trainer must have steps to take"):
                advise(OwnBatches(), trainer=trainer(tmp_path, **options), max_steps=max_steps)
    fitting = trainer(tmp_path)
    fitting.fit(WithAdam())
    fitting.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(ValueError, match="ckpt_path from the end of its run"):
        advise(WithAdam(), trainer=trainer(tmp_path), ckpt_path=tmp_path / "end.ckpt")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("max_steps", -1), ("max_steps", 2.5), ("batch_size", 0), ("train_copy", "no"), ("ckpt_path", "last")],
)
def test_a_bad_argument_is_named(tmp_path, argument, value):
    with pytest.raises(ValueError, match=f"^{argument} must be .*got {value!r}"):
        advise(WithAdam(), trainer=trainer(tmp_path), **{argument: value})


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_module_that_cannot_be_copied_is_trained_itself_if_told_and_restored(tmp_path):
    class WeightNormed(WithAdam):
        def __init__(self):
            super().__init__()
            nn.utils.weight_norm(self.net[0])
            self.net(torch.ones(2, 4))  # leaves a weight that is no leaf of the graph

    model = WeightNormed()
    before = values(model)
    with pytest.raises(TypeError, match=r"model must be .*copy.deepcopy.*WeightNormed.*train_copy=False"):
        advise(model, trainer=trainer(tmp_path), max_steps=2)
    assert advise(model, trainer=trainer(tmp_path), max_steps=2, train_copy=False).measured_steps == 2
    assert_same(values(model), before)


def test_a_module_that_another_trainer_has_fitted_stays_attached_to_it(tmp_path):
    model, fitting = boring(), trainer(tmp_path)
    fitting.fit(model)
    before = values(model)
    assert advise(model, trainer=trainer(tmp_path), max_steps=2).measured_steps == 2
    assert model.trainer is fitting
    assert_same(values(model), before)


def test_a_data_module_and_loaders_are_taken_as_by_fit(tmp_path):
    class Data(lightning.pytorch.LightningDataModule):
        def setup(self, stage):
            self.numbers = torch.randn(24, 4)

        def train_dataloader(self):
            return DataLoader(self.numbers, batch_size=6)

    data = Data()
    assert advise(WithAdam(), datamodule=data, trainer=trainer(tmp_path), max_steps=2).batch_size == 6
    assert not hasattr(data, "numbers")
    loader = DataLoader(torch.randn(24, 4), batch_size=3)
    assert advise(WithAdam(), loader, trainer=trainer(tmp_path), max_steps=2).batch_size == 3


def test_without_a_trainer_the_length_of_the_run_is_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    advice = advise(WithAdam(), max_steps=2)
    assert (advice.measured_steps, advice.steps, advice.batch_sizes[1].steps) == (2, None, None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fails", [False, True])
def test_shows_its_progress_on_a_terminal_where_the_trainer_would(tmp_path, fails):
    class Failing(WithAdam):
        def on_before_zero_grad(self, optimizer):
            if fails and self.global_step == 3:
                raise RuntimeError("no more")

    shown = []
    for enabled in (True, False):
        output = io.StringIO()
        rich.reconfigure(file=output, force_terminal=True, width=80)
        fitting = trainer(tmp_path, enable_progress_bar=enabled)
        with pytest.raises(RuntimeError, match="no more") if fails else contextlib.nullcontext():
            advise(Failing(), trainer=fitting, max_steps=4)
        shown.append(output.getvalue())
    assert "Measuring the noise scale" in shown[0]
    assert shown[0].rindex("\x1b[?25h") > shown[0].rindex("\x1b[?25l")  # the cursor is back
    assert shown[1] == ""
    assert (" 75%" if fails else "100%") in shown[0]


def test_takes_modules_and_trainers_of_pytorch_lightning(tmp_path):
    class Other(Linear, pytorch_lightning.LightningModule):
        pass

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fitting = pytorch_lightning.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)
    advice = advise(Other(**CLOSED_FORM), trainer=fitting, max_steps=5)
    assert (advice.measured_steps, advice.batch_size, advice.steps) == (5, 8, 400)


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_are_told_the_same_and_need_no_accumulation(tmp_path):
    first, second = on_ranks(2, on_this_rank, tmp_path)
    assert first == second
    advice = Advice.from_json(first)
    assert (advice.batch_size, advice.critical.batch_size) == (16, 16)
    assert abs(advice.critical.b_simple - B_SIMPLE) < 4 * advice.critical.standard_error
    assert any("that of one rank" in sentence for sentence in advice.unknown)
