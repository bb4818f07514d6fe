"""The predicted number of optimizer steps equals the number that the Trainer takes."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_lars.trainer.training_length import Beginning, steps_of_epochs, total_steps
from tests.support.walk import BATCHES, Walk, walk, walker


class Counted(Walk):
    """Asks for the number of steps before the first, and notes how many there were at every epoch's end."""

    def on_train_start(self):
        super().on_train_start()
        self.total = total_steps(self.trainer)
        self.by_epoch = [steps_of_epochs(self.trainer, epochs) for epochs in range(1, 4)]
        self.taken = []

    def on_train_epoch_end(self):
        self.taken.append(self.trainer.global_step)


class Endless(IterableDataset):
    """Never runs out."""

    def __iter__(self):
        while True:
            yield torch.zeros(1)


class EndlessCounted(Counted):
    """Trains on batches without end."""

    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=2)


OPTIONS = [
    {},
    {"max_epochs": 1},
    {"max_epochs": 3},
    {"accumulate_grad_batches": 2},
    {"accumulate_grad_batches": 5},
    {"accumulate_grad_batches": BATCHES},
    {"accumulate_grad_batches": BATCHES + 1},
    {"limit_train_batches": 7},
    {"limit_train_batches": 0.5},
    {"limit_train_batches": 7, "accumulate_grad_batches": 2},
    {"overfit_batches": 3},
    {"fast_dev_run": 3},
    {"max_steps": 5},
    {"max_steps": 17, "max_epochs": -1},
    {"max_steps": 100},
    {"max_steps": 5, "accumulate_grad_batches": 4, "max_epochs": None},
]
SCHEDULES = [{0: 2}, {0: 1, 1: 3}, {0: 4, 1: 5, 2: 1}, {1: 13}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_total_is_what_the_trainer_takes(tmp_path, options):
    module = walk(tmp_path, Counted(), **options)
    assert module.total == module.trainer.global_step > 0


@pytest.mark.parametrize("options", [{}, {"max_steps": 9}, {"limit_train_batches": 7}], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_total_follows_a_gradient_accumulation_scheduler(tmp_path, schedule, options):
    options = {"max_epochs": 3, **options}
    module = walk(tmp_path, Counted(), GradientAccumulationScheduler(schedule), **options)
    assert module.total == module.trainer.global_step


@pytest.mark.parametrize("schedule", [{0: 1}, *SCHEDULES], ids=str)
def test_the_steps_of_whole_epochs_match_those_taken_by_their_end(tmp_path, schedule):
    module = walk(tmp_path, Counted(), GradientAccumulationScheduler(schedule), max_epochs=3)
    assert module.by_epoch == module.taken


@pytest.mark.parametrize(
    ("epochs", "steps"), [(0, 0), (0.5, BATCHES / 2), (1.5, BATCHES + BATCHES / 6), (math.inf, math.inf)]
)
def test_a_part_of_an_epoch_has_its_part_of_the_steps(tmp_path, epochs, steps):
    module = walk(tmp_path, Walk(), GradientAccumulationScheduler({0: 1, 1: 3}))
    assert steps_of_epochs(module.trainer, epochs) == steps


@pytest.mark.parametrize(
    "options",
    [{"max_steps": 7}, {"max_steps": 7, "accumulate_grad_batches": 2}, {"limit_train_batches": 5}],
    ids=str,
)
def test_an_endless_loader_ends_with_max_steps_or_a_limit(tmp_path, options):
    module = walk(tmp_path, EndlessCounted(), **options)
    assert module.total == module.trainer.global_step > 0


def test_an_endless_loader_has_epochs_without_end(tmp_path):
    module = walk(tmp_path, EndlessCounted(), max_steps=3)
    assert module.by_epoch == [math.inf] * 3


class Stops(Counted):
    """Has no end of its own but stops early."""

    def training_step(self, batch, batch_idx):
        self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


def test_a_run_without_end_has_endless_steps(tmp_path):
    assert walk(tmp_path, Stops(), max_epochs=-1).total == math.inf


class AsksEarly(Walk):
    """Asks while it configures its optimizers, before Lightning has loaded the data."""

    def configure_optimizers(self):
        self.total = total_steps(self.trainer)
        return super().configure_optimizers()


def test_is_known_where_optimizers_are_configured(tmp_path):
    module = walk(tmp_path, AsksEarly(), accumulate_grad_batches=5)
    assert module.total == module.trainer.global_step


class CountedFromHere(Walk):
    """Asks how many steps there are from its beginning, while it configures its optimizers and later."""

    def configure_optimizers(self):
        here = Beginning(self.trainer.current_epoch, self.trainer.global_step)
        self.before, self.totals = self.trainer.global_step, [total_steps(self.trainer, here)]
        return super().configure_optimizers()

    def on_train_start(self):
        super().on_train_start()
        here = Beginning(self.trainer.current_epoch, self.trainer.global_step)
        self.totals.append(total_steps(self.trainer, here))


class Interrupted(CountedFromHere):
    """Breaks off once, in the second epoch."""

    failed = False

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == BATCHES + 3 and not self.failed:
            self.failed = True
            raise RuntimeError("broken off")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("options", "then"),
    [
        ({}, {"max_epochs": 3}),
        ({}, {"max_epochs": 5, "accumulate_grad_batches": 4}),
        ({"max_steps": 5}, {"max_steps": 20}),
        ({"max_steps": 5, "max_epochs": -1}, {"max_steps": 20}),
        ({"accumulate_grad_batches": 5}, {"max_epochs": 4}),
        ({}, {}),
        ({"max_steps": 7}, {}),
        ({"max_epochs": 0}, {"max_epochs": 1}),
    ],
    ids=str,
)
def test_a_second_fit_has_what_is_left(tmp_path, options, then):
    module, fitting = CountedFromHere(), walker(tmp_path, **options)
    fitting.fit(module)
    fitting.fit_loop.epoch_loop.max_steps = then.get("max_steps", fitting.max_steps)
    fitting.fit_loop.max_epochs = then.get("max_epochs", fitting.max_epochs)
    fitting.accumulate_grad_batches = then.get("accumulate_grad_batches", fitting.accumulate_grad_batches)
    fitting.fit(module)
    assert set(module.totals) == {fitting.global_step - module.before}


def test_a_fit_after_an_exception_has_what_is_left(tmp_path):
    module, fitting = Interrupted(), walker(tmp_path)
    with pytest.raises(RuntimeError, match="broken off"):
        fitting.fit(module)
    fitting.fit(module)
    assert set(module.totals) == {fitting.global_step - module.before}
