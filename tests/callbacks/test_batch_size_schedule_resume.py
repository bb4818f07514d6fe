"""A resumed run follows the schedule of the batch size as an uninterrupted one."""

import csv

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_lars import BatchSizeScaling, BatchSizeSchedule, LearningRateWarmup
from tests.support.mean import BATCHES, SIZE, Mean, Reference, numbers
from tests.support.walk import walker

pytestmark = [
    # Lightning's own, about what the tests do on purpose.
    pytest.mark.filterwarnings("ignore:.*fit\\(ckpt_path="),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
SCHEDULES = {
    "steps": {0: 2, 2: 6, 5: 4, 7: 10},
    "samples": {0: 2, 4: 6, 18: 4, 26: 10},
}


class AnyOrder(Mean):
    """Takes its numbers by the index of the batch: a loader begins anew when a run is resumed."""

    def training_step(self, batch, batch_idx):
        return self.w * numbers().unflatten(0, (-1, SIZE))[batch_idx].mean()


class EveryBatch(Callback):
    """Keeps a checkpoint of every batch, and of every epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{len(pl_module.accumulated) + 1}.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/epoch {trainer.current_epoch}.ckpt")


def close(values):
    return pytest.approx(values, rel=1e-12, abs=1e-15)


def callbacks(unit):
    return BatchSizeSchedule(SCHEDULES[unit], unit=unit), BatchSizeScaling(SIZE), LearningRateWarmup(8)


def sizes(logger):
    """The batch size of every step in the log."""
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return {int(row["step"]): float(row["batch_size/effective"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize("unit", SCHEDULES)
def test_continues_from_every_batch(tmp_path, unit):
    logger = CSVLogger(tmp_path / "straight")
    straight, told = AnyOrder(), Reference(SCHEDULES[unit], unit)
    options = {"logger": logger, "log_every_n_steps": 1}
    walker(tmp_path, *callbacks(unit), EveryBatch(), **options).fit(straight)
    assert straight.stepped == close(told.stepped)
    assert sizes(logger) == dict(enumerate(told.sizes))
    for steps in range(1, len(told.stepped)):
        batch = told.steps_after.index(steps) + 1
        logger = CSVLogger(tmp_path / f"from {batch}")
        resumed = AnyOrder()
        trainer = walker(tmp_path / "resumed", *callbacks(unit), **{**options, "logger": logger})
        trainer.fit(resumed, ckpt_path=tmp_path / f"{batch}.ckpt")
        assert resumed.stepped == straight.stepped[steps:]
        assert resumed.rates == straight.rates[steps:]
        assert resumed.accumulated == straight.accumulated[batch:]
        assert resumed.w.item() == straight.w.item()
        assert sizes(logger) == {step: size for step, size in enumerate(told.sizes) if step >= steps}


@pytest.mark.parametrize("unit", SCHEDULES)
def test_continues_from_the_end_of_an_epoch(tmp_path, unit):
    straight, resumed = AnyOrder(), AnyOrder()
    walker(tmp_path, *callbacks(unit), EveryBatch()).fit(straight)
    walker(tmp_path, *callbacks(unit)).fit(resumed, ckpt_path=tmp_path / "epoch 0.ckpt")
    assert resumed.accumulated == straight.accumulated[BATCHES:]
    assert resumed.rates == straight.rates[-len(resumed.rates) :]


def test_a_step_that_had_lost_its_first_batches_begins_anew(tmp_path):
    walker(tmp_path, BatchSizeSchedule({0: 6, 1: 8}), EveryBatch()).fit(AnyOrder())
    resumed = AnyOrder()
    trainer = walker(tmp_path, BatchSizeSchedule({0: 6, 1: 8}), max_epochs=1)
    trainer.fit(resumed, ckpt_path=tmp_path / "5.ckpt")
    means = numbers().unflatten(0, (-1, SIZE)).mean(1)
    assert resumed.stepped == close([means[5:9].mean().item(), means[9:].mean().item()])


class Large(AnyOrder):
    """Takes batches of twice the size."""

    def training_step(self, batch, batch_idx):
        return self.w * numbers()[: BATCHES // 2 * 2 * SIZE].unflatten(0, (-1, 2 * SIZE))[batch_idx].mean()

    def train_dataloader(self):
        return DataLoader(numbers(), batch_size=2 * SIZE, drop_last=True)


@pytest.mark.parametrize("unit", ["steps", "samples"])
def test_continues_with_another_batch_size_per_device(tmp_path, unit):
    batch_sizes = {0: 4, 2: 8} if unit == "steps" else {0: 4, 24: 8}
    walker(tmp_path, BatchSizeSchedule(batch_sizes, unit=unit), EveryBatch(), max_epochs=1).fit(AnyOrder())
    resumed = Large()
    trainer = walker(tmp_path, BatchSizeSchedule(batch_sizes, unit=unit))
    trainer.fit(resumed, ckpt_path=tmp_path / "epoch 0.ckpt")
    means = numbers()[:20].unflatten(0, (-1, 4)).mean(1).tolist()
    told = {
        "steps": [sum(means[:2]) / 2, sum(means[2:4]) / 2, means[4]],
        # The first epoch ended with 22 samples, or, of a step more, with 26.
        "samples": [means[0], sum(means[1:3]) / 2, sum(means[3:]) / 2],
    }
    assert resumed.stepped == close(told[unit])


def test_a_checkpoint_without_the_schedule_is_counted_by_its_batches(tmp_path):
    walker(tmp_path, EveryBatch(), max_epochs=1).fit(AnyOrder())
    resumed = AnyOrder()
    schedule = BatchSizeSchedule({0: 2, 21: 22, 23: 6}, unit="samples")
    walker(tmp_path, schedule).fit(resumed, ckpt_path=tmp_path / "epoch 0.ckpt")
    [whole] = resumed.stepped
    assert whole == close(numbers().mean().item())
    resumed = AnyOrder()
    trainer = walker(tmp_path, BatchSizeSchedule({0: 2, 1: 22}), max_epochs=1)
    trainer.fit(resumed, ckpt_path=tmp_path / "5.ckpt")
    assert resumed.stepped == close([numbers()[5 * SIZE :].mean().item()])


@pytest.mark.parametrize("unit", SCHEDULES)
def test_a_second_fit_continues_and_another_trainer_begins_anew(tmp_path, unit):
    straight = AnyOrder()
    walker(tmp_path, BatchSizeSchedule(SCHEDULES[unit], unit=unit), EveryBatch()).fit(straight)
    module, schedule = AnyOrder(), BatchSizeSchedule(SCHEDULES[unit], unit=unit)
    trainer = walker(tmp_path, schedule, max_epochs=1)
    trainer.fit(module)
    # The state of another checkpoint is no progress of this training.
    module.validation_step = lambda batch, batch_idx: None
    trainer.validate(module, module.train_dataloader(), ckpt_path=tmp_path / "3.ckpt", verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert module.stepped == straight.stepped
    again = AnyOrder()
    walker(tmp_path, schedule).fit(again)
    assert again.stepped == straight.stepped
