"""What follows a scheduled batch size: rates, warmups, lengths, monitors and the progress bar."""

import csv
import logging
from functools import partial

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging

from lightning_lars import (
    LARS,
    BatchSizeScaling,
    BatchSizeSchedule,
    GradientNoiseScale,
    LargeBatchMixin,
    LearningRateWarmup,
    WarmupDecayLR,
)
from lightning_lars.trainer.training_length import steps_of_epochs, total_steps
from tests.support.mean import BATCHES, RATE, SIZE, Mean, OtherMean, Reference
from tests.support.walk import walker

SCHEDULES = {
    "steps": {0: 2, 3: 6, 5: 4, 8: 10},
    "samples": {0: 2, 4: 6, 18: 4, 26: 10},
}
ROOTS = {"lightning": (lightning.pytorch, Mean), "pytorch_lightning": (pytorch_lightning, OtherMean)}


def close(values):
    return pytest.approx(values, rel=1e-12, abs=1e-15)


def column(logger, key):
    """The values of a metric in the log, by step; those of the batches of a step are the same."""
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [(int(row["step"]), float(row[key])) for row in csv.DictReader(file) if row.get(key)]
    assert len(set(rows)) == len(dict(rows))
    return dict(rows)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("order", ["schedule first", "schedule last"])
@pytest.mark.parametrize("unit", SCHEDULES)
def test_the_rate_is_that_of_the_batch_of_the_step_and_monitored_as_such(tmp_path, unit, order, root):
    package, module = ROOTS[root]
    logger, module = package.loggers.CSVLogger(tmp_path), module()
    callbacks = [
        BatchSizeSchedule(SCHEDULES[unit], unit=unit),
        LearningRateWarmup(6),
        package.callbacks.LearningRateMonitor("step"),
        BatchSizeScaling(4, "sqrt"),
    ]
    if order == "schedule last":
        callbacks.reverse()
    walker(tmp_path, *callbacks, root=package, logger=logger, log_every_n_steps=1).fit(module)
    told = Reference(SCHEDULES[unit], unit)
    rates = [RATE * min(1.0, step / 6) * (size / 4) ** 0.5 for step, size in enumerate(told.sizes, start=1)]
    assert module.stepped == close(told.stepped)
    assert module.rates == close(rates)
    # The log is read back in single precision.
    assert column(logger, "lr-SGD") == pytest.approx(dict(enumerate(rates)), rel=1e-6)
    assert column(logger, "batch_size/effective") == dict(enumerate(told.sizes))


class Watching(Mean):
    """Looks at the progress bar."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.shown.append(self.trainer.progress_bar_metrics.get("batch_size/effective"))

    shown = ()


def test_the_progress_bar_shows_the_batch_size_of_the_latest_step(tmp_path):
    module = Watching()
    module.shown = []
    walker(tmp_path, BatchSizeSchedule(SCHEDULES["steps"])).fit(module)
    told = Reference(SCHEDULES["steps"], "steps")
    assert module.shown == [([None, *told.sizes])[steps] for steps in [0, *told.steps_after[:-1]]]


@pytest.mark.parametrize("unit", SCHEDULES)
@pytest.mark.parametrize("epochs", [1, 2, 12])
def test_lengths_in_steps_are_those_of_the_schedule(tmp_path, unit, epochs):
    module, lengths = Mean(), []
    module.on_train_start = lambda: lengths.append(
        [total_steps(module.trainer), steps_of_epochs(module.trainer, 0.5)]
    )
    walker(tmp_path, BatchSizeSchedule(SCHEDULES[unit], unit=unit), max_epochs=epochs).fit(module)
    first = len(Reference(SCHEDULES[unit], unit, epochs=1).stepped)
    assert lengths == [[len(module.stepped), first / 2]]
    assert len(module.stepped) == len(Reference(SCHEDULES[unit], unit, epochs=epochs).stepped)


DECAY = partial(WarmupDecayLR, warmup_steps=0)


class Mixed(LargeBatchMixin, Mean):
    """With the optimizer and the schedule of the mixin."""

    configure_optimizers = LargeBatchMixin.configure_optimizers


def test_a_decay_and_a_warmup_end_with_the_run(tmp_path):
    module = Mixed(optimizer=lambda groups: torch.optim.SGD(groups, lr=RATE), lr_scheduler=DECAY)
    warmup = LearningRateWarmup(warmup_fraction=0.5)
    walker(tmp_path, BatchSizeSchedule(SCHEDULES["samples"], unit="samples"), warmup).fit(module)
    steps = len(Reference(SCHEDULES["samples"], "samples").stepped)
    assert module.trainer.lr_scheduler_configs[0].scheduler.total_steps == steps
    alone = Mixed(optimizer=lambda groups: torch.optim.SGD(groups, lr=RATE), lr_scheduler=DECAY)
    walker(tmp_path, max_steps=steps).fit(alone)
    factors = [min(1.0, step / round(steps / 2)) for step in range(1, steps + 1)]
    assert module.rates == close([rate * f for rate, f in zip(alone.rates, factors, strict=True)])


class Fails(lightning.pytorch.Callback):
    """Fails once, in the middle of an epoch."""

    has_failed = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 7 and not self.has_failed:
            self.has_failed = True
            raise RuntimeError("a device is lost")


@pytest.mark.parametrize("unit", SCHEDULES)
@pytest.mark.parametrize("before", ["two steps", "an exception", "another loader"])
def test_a_decay_and_a_warmup_end_with_a_second_fit(tmp_path, unit, before):
    module = Mixed(optimizer=lambda groups: torch.optim.SGD(groups, lr=RATE), lr_scheduler=DECAY)
    callbacks = [BatchSizeSchedule(SCHEDULES[unit], unit=unit), LearningRateWarmup(warmup_fraction=0.5)]
    callbacks += [Fails()] if before == "an exception" else []
    steps = 2 if before == "two steps" else -1
    trainer = walker(tmp_path, *callbacks, max_epochs=1, max_steps=steps)
    if before == "an exception":
        with pytest.raises(RuntimeError, match="a device is lost"):
            trainer.fit(module)
    else:
        trainer.fit(module)
    if before == "another loader":
        module.data = module.data[: 5 * SIZE]
    module.rates.clear()
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 4, -1
    trainer.fit(module)
    steps = len(module.rates)
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == steps
    alone = Mixed(optimizer=lambda groups: torch.optim.SGD(groups, lr=RATE), lr_scheduler=DECAY)
    walker(tmp_path, max_epochs=-1, max_steps=steps).fit(alone)
    factors = [min(1.0, step / round(steps / 2)) for step in range(1, steps + 1)]
    assert module.rates == close([rate * f for rate, f in zip(alone.rates, factors, strict=True)])


@pytest.mark.parametrize(
    "larger",
    [BatchSizeSchedule({0: 2, 6: 22}), GradientAccumulationScheduler({0: 1, 1: 11})],
    ids=lambda each: type(each).__name__,
)
def test_a_rule_that_does_not_hold_for_a_later_batch_size_is_refused_at_the_start(tmp_path, larger):
    module = Mean()
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), lr=RATE, betas=(0.9, 0.999))
    with pytest.raises(MisconfigurationException, match=r"adam_sqrt.*got 11 times"):
        walker(tmp_path, BatchSizeScaling(2, "adam_sqrt"), larger).fit(module)
    assert module.stepped == []


def test_the_scaled_rate_is_said_of_the_step_that_an_epoch_starts_with(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        walker(tmp_path, BatchSizeScaling(2), BatchSizeSchedule({0: 10}), max_epochs=3).fit(Mean())
    said = [each.getMessage() for each in caplog.records if each.getMessage().startswith("BatchSizeScaling")]
    assert len(said) == 1
    assert "effective batch size 10 = 2 per device" in said[0]


def test_a_noise_scale_that_is_never_logged_is_refused(tmp_path):
    callbacks = [GradientNoiseScale(), BatchSizeSchedule({0: 4, 3: 8}, noise_scale=1.0)]
    with pytest.raises(MisconfigurationException, match="log_every_n_steps above 0"):
        walker(tmp_path, *callbacks, log_every_n_steps=0).fit(Mean())


class Interferes(lightning.pytorch.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        trainer.accumulate_grad_batches = 2


def test_something_else_that_sets_the_accumulated_batches_during_training_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="something else has set it to 2"):
        walker(tmp_path, BatchSizeSchedule({0: 6}), Interferes()).fit(Mean())


def test_the_noise_scale_is_measured_beside_it(tmp_path):
    noise_scale, module = GradientNoiseScale(every_n_steps=1, decay=0.0), Mean()
    trainer = walker(tmp_path, noise_scale, BatchSizeSchedule({0: 4, 3: 8}), max_epochs=1)
    trainer.fit(module)
    told = Reference({0: 4, 3: 8}, "steps", epochs=1)
    assert told.sizes == [4, 4, 4, 8, 2]
    # Of the last step of several micro-batches, by equation A.2 of the paper.
    small = sum(g**2 for g in told.micro[6:10]) / 4
    big = told.stepped[3] ** 2
    tr_sigma = (small - big) / (1 / 2 - 1 / 8)
    assert trainer.callback_metrics["gradient_noise_scale/tr_sigma"].item() == pytest.approx(tr_sigma)


class Normed(Mean):
    """Has running statistics, for which averaged weights take an extra epoch without a backward pass."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1, affine=False, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        self.norm(batch[:, None])
        return super().training_step(batch, batch_idx)


def test_the_extra_epoch_of_averaged_weights_is_left_to_lightning(tmp_path):
    module = Normed()
    averaging = StochasticWeightAveraging(swa_lrs=RATE, swa_epoch_start=1)
    walker(tmp_path, averaging, BatchSizeSchedule(SCHEDULES["steps"]), max_epochs=3).fit(module)
    told = Reference(SCHEDULES["steps"], "steps", epochs=3)
    assert module.stepped[: len(told.stepped)] == close(told.stepped)
    assert len(module.accumulated) == 4 * BATCHES
    assert module.accumulated[-2] == module.accumulated[3 * BATCHES - 1]
    assert module.trainer.accumulate_grad_batches == 1


def test_says_when_the_batch_size_changes(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        walker(tmp_path, BatchSizeSchedule({0: 2, 10: 6}, unit="samples"), max_epochs=1).fit(Mean())
    messages = [record.getMessage() for record in caplog.records]
    said = [message.split(": ")[1] for message in messages if message.startswith("BatchSizeSchedule")]
    assert said == [
        "effective batch size 2 = 2 per device x 1 replica x 1 accumulated, after 0 samples",
        "effective batch size 6 = 2 per device x 1 replica x 3 accumulated, after 10 samples",
    ]


def test_works_with_layer_adaptation(tmp_path):
    module = Mean()
    module.configure_optimizers = lambda: LARS(module.parameters(), lr=RATE, trust_coefficient=1.0)
    walker(tmp_path, BatchSizeSchedule(SCHEDULES["steps"])).fit(module)
    assert module.stepped == close(Reference(SCHEDULES["steps"], "steps").stepped)


def test_trains_without_any_logging(tmp_path):
    module = Mean()
    trainer = lightning.pytorch.Trainer(
        barebones=True, max_epochs=2, accelerator="cpu", callbacks=[BatchSizeSchedule(SCHEDULES["steps"])]
    )
    trainer.fit(module)
    assert module.stepped == close(Reference(SCHEDULES["steps"], "steps").stepped)
