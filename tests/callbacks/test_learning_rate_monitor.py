"""LearningRateMonitor logs the rates that the steps used, wherever it is in the list of callbacks."""

import csv

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.optim import lr_scheduler

from lightning_lars import BatchSizeScaling, LearningRateWarmup
from tests.support.walk import BATCH_SIZE, BATCHES, RATES, OtherWalk, Walk, scaled, walk, walker

WARMUP, BASE = 15, 3
ROOTS = {"lightning": (lightning.pytorch, Walk), "pytorch_lightning": (pytorch_lightning, OtherWalk)}
COLUMNS = ("lr-SGD/pg1", "lr-SGD/pg2")


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)


def logged(logger):
    """The learning rates in the log, in order, by step."""
    rows = {}
    with open(f"{logger.log_dir}/metrics.csv") as file:
        for row in csv.DictReader(file):
            if row[COLUMNS[0]]:
                rows.setdefault(int(row["step"]), []).append(tuple(float(row[key]) for key in COLUMNS))
    return rows


def arranged(order, monitor):
    """A warmup and a scaling with the monitor in a place among them."""
    callbacks = [LearningRateWarmup(WARMUP), BatchSizeScaling(BASE)]
    callbacks.insert(("first", "between", "last").index(order), monitor)
    return callbacks


def close(rates):
    return [pytest.approx(step, rel=1e-12, abs=1e-14) for step in rates]


@pytest.mark.parametrize("scheduler", [None, cosine])
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("order", ["first", "between", "last"])
def test_logs_the_rates_that_the_steps_used(tmp_path, order, root, scheduler):
    package, module = ROOTS[root]
    monitor, logger = package.callbacks.LearningRateMonitor("step"), package.loggers.CSVLogger(tmp_path)
    module = module(scheduler=scheduler)
    walk(tmp_path, module, *arranged(order, monitor), root=package, logger=logger, log_every_n_steps=1)
    rows = logged(logger)
    assert list(rows) == list(range(2 * BATCHES))
    assert [rates for (rates,) in rows.values()] == close(module.rates())


@pytest.mark.parametrize("order", ["first", "between", "last"])
def test_callbacks_after_the_monitor_see_the_plain_rates(tmp_path, order):
    monitor, logger = lightning.pytorch.callbacks.LearningRateMonitor(), CSVLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 1}
    module = walk(tmp_path, Walk(scheduler=cosine), *arranged(order, monitor), **options)
    assert module.seen == walk(tmp_path, Walk(scheduler=cosine)).seen


@pytest.mark.parametrize("order", ["first", "between", "last"])
def test_logs_the_rate_of_the_first_step_of_every_epoch(tmp_path, order):
    monitor, logger = lightning.pytorch.callbacks.LearningRateMonitor("epoch"), CSVLogger(tmp_path)
    module = walk(tmp_path, Walk(scheduler=cosine), *arranged(order, monitor), logger=logger)
    rows = logged(logger)
    assert list(rows) == [0, BATCHES]
    assert [rates for (rates,) in rows.values()] == close(module.rates()[::BATCHES])


def test_logs_the_coming_rate_at_every_batch_that_is_accumulated(tmp_path):
    monitor, logger = lightning.pytorch.callbacks.LearningRateMonitor("step"), CSVLogger(tmp_path)
    callbacks = arranged("last", monitor)
    module = Walk(scheduler=cosine)
    walk(
        tmp_path,
        module,
        *callbacks,
        logger=logger,
        log_every_n_steps=1,
        accumulate_grad_batches=2,
        max_epochs=3,
    )
    rows = logged(logger)
    assert len(rows) == len(module.rates())
    for rates, (step, values) in zip(module.rates(), rows.items(), strict=True):
        assert values == close([rates] * len(values)), step


def test_two_monitors_log_the_same(tmp_path):
    loggers = [CSVLogger(tmp_path, name="one")]
    monitors = [lightning.pytorch.callbacks.LearningRateMonitor("step") for _ in range(2)]
    callbacks = [monitors[0], LearningRateWarmup(WARMUP), monitors[1]]
    module = walk(tmp_path, Walk(), *callbacks, logger=loggers, log_every_n_steps=1)
    for monitor in monitors:
        logged_by = list(zip(*(monitor.lrs[key] for key in COLUMNS), strict=True))
        assert [rates for rates in logged_by if rates] == close(module.rates())


def test_a_subclass_of_the_monitor_logs_them_too(tmp_path):
    class Monitor(lightning.pytorch.callbacks.LearningRateMonitor):
        pass

    logger = CSVLogger(tmp_path)
    module = walk(
        tmp_path, Walk(), Monitor("step"), LearningRateWarmup(15), logger=logger, log_every_n_steps=1
    )
    assert [rates for (rates,) in logged(logger).values()] == close(module.rates())


class Fails(Walk):
    """Breaks off once, inside a step."""

    failed = False

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 3 and not self.failed:
            self.failed = True
            raise RuntimeError("broken off")
        return super().training_step(batch, batch_idx)


def test_logs_a_fit_after_an_exception_from_the_first_step(tmp_path):
    monitor, logger = lightning.pytorch.callbacks.LearningRateMonitor("epoch"), CSVLogger(tmp_path)
    module, fitting = Fails(), walker(tmp_path, *arranged("last", monitor), logger=logger)
    with pytest.raises(RuntimeError, match="broken off"):
        fitting.fit(module)
    fitting.fit(module)
    assert monitor.lrs[COLUMNS[0]][0] == pytest.approx(module.rates()[0][0], rel=1e-12, abs=1e-14)


class Unsized(Walk):
    """Has a loader that does not tell its batch size."""

    def train_dataloader(self):
        indices = range(BATCHES * BATCH_SIZE)
        batches = [list(indices[start : start + BATCH_SIZE]) for start in indices[::BATCH_SIZE]]
        return torch.utils.data.DataLoader(torch.zeros(BATCHES * BATCH_SIZE, 1), batch_sampler=batches)


@pytest.mark.parametrize("interval", [None, "step"])
def test_logs_the_rates_of_a_loader_without_a_batch_size(tmp_path, interval):
    monitor, logger = lightning.pytorch.callbacks.LearningRateMonitor(interval), CSVLogger(tmp_path)
    module = Unsized(scheduler=cosine)
    walk(tmp_path, module, monitor, BatchSizeScaling(BASE), logger=logger, log_every_n_steps=1)
    assert module.rates()[0] == pytest.approx(scaled([RATES], [BATCH_SIZE / BASE])[0], rel=1e-12)
    assert [rates for (rates,) in logged(logger).values()] == close(module.rates())
