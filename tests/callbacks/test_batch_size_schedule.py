"""A scheduled batch size: the gradient of every step, after every batch, and what is refused."""

import copy
import pickle
import re

import pytest
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_lars import BatchSizeSchedule
from lightning_lars.trainer.accumulation import AccumulatedBatches
from tests.support.mean import BATCHES, RATE, SIZE, Mean, Reference, Stream, numbers
from tests.support.walk import walker


def close(values):
    return pytest.approx(values, rel=1e-12, abs=1e-15)


SCHEDULES = {
    "constant": ({0: 6}, "steps"),
    "doubling": ({0: 2, 3: 4, 5: 8}, "steps"),
    "sizes without a common multiple": ({0: 4, 1: 6, 2: 10, 3: 2, 5: 6, 6: 4}, "steps"),
    "samples": ({0: 2, 5: 6, 13: 4, 21: 10}, "samples"),
    "shrinking": ({0: 10, 1: 4, 3: 2}, "steps"),
    "an epoch": ({0: 2, 4: 22}, "steps"),
    "skipping what is over before it begins": ({0: 10, 1: 2, 3: 4, 11: 6}, "samples"),
    "unordered": ({6: 2, 0: 6, 2: 4}, "steps"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_is_the_mean_of_the_batches_that_the_schedule_says(tmp_path, name):
    batch_sizes, unit = SCHEDULES[name]
    module, told = Mean(), Reference(batch_sizes, unit)
    walker(tmp_path, BatchSizeSchedule(batch_sizes, unit=unit)).fit(module)
    assert [step for _, step in module.accumulated] == [step for _, step in told.accumulated]
    assert [g for g, _ in module.accumulated] == close([g for g, _ in told.accumulated])
    assert module.stepped == close(told.stepped)
    assert module.w.item() == close(-RATE * sum(told.stepped))
    assert module.sizes == told.size_of_batches


@pytest.mark.parametrize(
    ("arguments", "equal"),
    [
        ({"start": 2, "increment": 4, "every": 3, "end": 12}, {0: 2, 3: 6, 6: 10, 9: 12}),
        ({"start": 2, "increment": 4, "every": 3, "end": 10}, {0: 2, 3: 6, 6: 10}),
        ({"start": 2, "factor": 2, "every": 4, "end": 8}, {0: 2, 4: 4, 8: 8}),
        ({"start": 2, "factor": 3, "every": 1, "end": 10}, {0: 2, 1: 6, 2: 10}),
        ({"start": 6, "factor": 2, "every": 1, "end": 6}, {0: 6}),
    ],
)
@pytest.mark.parametrize("unit", ["steps", "samples"])
def test_ramps_and_multiplication_are_schedules_too(tmp_path, arguments, equal, unit):
    schedule = BatchSizeSchedule(**arguments, unit=unit)
    assert schedule.batch_sizes == equal
    module = Mean()
    walker(tmp_path, schedule).fit(module)
    assert module.stepped == close(Reference(equal, unit).stepped)


def test_a_limited_epoch_ends_with_the_mean_of_what_is_left(tmp_path):
    module = Mean()
    walker(tmp_path, BatchSizeSchedule({0: 6}), limit_train_batches=5).fit(module)
    told = Reference({0: 6}, "steps", batches=5)
    assert told.sizes == [6, 4, 6, 4]
    assert module.stepped == close(told.stepped)


def test_an_epoch_of_unknown_length_ends_as_in_lightning(tmp_path):
    module, told = Mean(Stream()), Reference({0: 2, 2: 6}, "steps", epochs=1)
    walker(tmp_path, BatchSizeSchedule({0: 2, 2: 6}), max_epochs=1).fit(module)
    assert told.sizes == [2, 2, 6, 6, 6]
    assert module.stepped == close(told.stepped)
    module = Mean(Stream())
    walker(tmp_path, BatchSizeSchedule({0: 10}), max_epochs=2).fit(module)
    [*_, last] = numbers().unflatten(0, (-1, SIZE)).mean(1).tolist()
    assert module.stepped[2::3] == close([last / 5] * 2)


class Skipping(Mean):
    """Gives up its first epoch at the fifth batch, in the middle of a step."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 4 and self.trainer.current_epoch == 0 else None


def test_a_step_that_an_epoch_gave_up_is_not_carried_into_the_next(tmp_path):
    module = Skipping()
    walker(tmp_path, BatchSizeSchedule({0: 6, 7: 4}, unit="samples")).fit(module)
    first = Reference({0: 6}, "steps", epochs=1)
    assert module.stepped == close(first.stepped[:1] + first.stepped[:1] + module.stepped[2:])
    means = numbers().unflatten(0, (-1, SIZE)).mean(1).tolist()
    assert module.stepped[2:] == close(
        [sum(means[i : i + 2]) / len(means[i : i + 2]) for i in range(3, BATCHES, 2)]
    )


class Validated(Mean):
    """Has validation data."""

    def validation_step(self, batch, batch_idx):
        self.w * batch.mean()

    val_dataloader = Mean.train_dataloader


def test_validation_between_the_batches_of_a_step_leaves_their_gradients(tmp_path):
    module, told = Validated(), Reference({0: 6, 2: 10}, "steps")
    walker(tmp_path, BatchSizeSchedule({0: 6, 2: 10}), val_check_interval=1).fit(module)
    assert [g for g, _ in module.accumulated] == close([g for g, _ in told.accumulated])
    assert module.stepped == close(told.stepped)


class Reloaded(Mean):
    """Has batches of twice the size in its second epoch."""

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=SIZE * (1 + self.trainer.current_epoch), drop_last=True)


def test_follows_a_loader_that_is_reloaded_with_another_batch_size(tmp_path):
    module = Reloaded()
    options = {"reload_dataloaders_every_n_epochs": 1}
    walker(tmp_path, BatchSizeSchedule({0: 4, 8: 8}), **options).fit(module)
    pairs, fours = numbers().unflatten(0, (-1, 2)).mean(1), numbers()[:20].unflatten(0, (-1, 4)).mean(1)
    first = [*pairs[:10].unflatten(0, (-1, 2)).mean(1), pairs[10]]
    second = [*fours[:2], fours[2:4].mean(), fours[4]]
    assert module.stepped == close([each.item() for each in (*first, *second)])


def test_several_loaders_make_up_a_batch_together(tmp_path):
    module = Mean()
    module.train_dataloader = lambda: {
        "a": DataLoader(numbers(), batch_size=SIZE),
        "b": DataLoader(numbers(), batch_size=2 * SIZE, drop_last=True),
    }
    module.training_step = lambda batch, batch_idx: module.w * batch["a"].mean()
    walker(tmp_path, BatchSizeSchedule({0: 6, 1: 18, 2: 24})).fit(module)
    means = numbers().unflatten(0, (-1, SIZE)).mean(1)
    epochs = [[means[:1], means[1:4], means[4:8], means[8:]], [means[:4], means[4:8], means[8:]]]
    assert module.stepped == close([step.mean().item() for steps in epochs for step in steps])


class Interrupted(Mean):
    """Fails in the middle of a step."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        if batch_idx == 4:
            raise RuntimeError("interrupted")


def test_a_trainer_gets_its_own_accumulation_back(tmp_path):
    schedule = BatchSizeSchedule({0: 6})
    trainer = walker(tmp_path, schedule)
    trainer.fit(Mean())
    assert repr(trainer.accumulate_grad_batches) == "1"
    assert type(trainer.accumulate_grad_batches) is int
    trainer = walker(tmp_path, schedule)
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.fit(Interrupted())
    assert repr(trainer.accumulate_grad_batches) == "1"
    assert type(trainer.accumulate_grad_batches) is int


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            "batch_sizes must be given, or start, end, every, and either increment or factor, got start=None",
        ),
        ({"start": 2, "end": 4, "every": 1}, "either increment or factor, got start=2, end=4, every=1, incr"),
        ({"start": 2, "end": 4, "every": 1, "increment": 2, "factor": 2}, "increment=2, factor=2"),
        ({"start": 2, "factor": 2, "every": 1}, "end=None"),
        (
            {"batch_sizes": {0: 2}, "start": 2},
            "every, increment and factor, got {'start': 2} too",
        ),
        ({"batch_sizes": {}}, "batch_sizes must be a dict with a batch size from 0 on, got {}"),
        ({"batch_sizes": {1: 2}}, "batch_sizes must be a dict with a batch size from 0 on, got {1: 2}"),
        ({"batch_sizes": [2, 4]}, "batch_sizes must be a dict with a batch size from 0 on, got [2, 4]"),
        (
            {"batch_sizes": {0: 0}},
            "must be batch sizes above 0 by the number of steps, at least 0",
        ),
        ({"batch_sizes": {0: 2, -1: 2}}, "got {-1: 2}"),
        ({"batch_sizes": {0: 2, 1.5: 2}}, "got {1.5: 2}"),
        ({"batch_sizes": {0: 2, 1: 2.5}}, "got {1: 2.5}"),
        ({"batch_sizes": {0: 2, 1: True}}, "got {1: True}"),
        ({"batch_sizes": {0: 2}, "unit": "epochs"}, 'unit must be "steps" or "samples", got \'epochs\''),
        ({"batch_sizes": {0: 2}, "batch_size": 0}, "batch_size must be an integer above 0, got 0"),
        ({"start": 0, "end": 4, "every": 1, "increment": 1}, "start must be an integer above 0, got 0"),
        ({"start": 4, "end": 2, "every": 1, "increment": 1}, "end must be at least start=4, got 2"),
        ({"start": 2, "end": 4, "every": 0, "increment": 1}, "every must be an integer above 0, got 0"),
        (
            {"start": 2, "end": 4, "every": 1, "increment": 0},
            "increment must be an integer above 0",
        ),
        ({"start": 2, "end": 4, "every": 1, "factor": 1}, "factor must be an integer, at least 2, got 1"),
        (
            {"start": 2, "end": 4, "every": 1, "factor": 1.5},
            "an integer, at least 2, got 1.5",
        ),
    ],
)
def test_an_argument_that_breaks_its_rule_is_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BatchSizeSchedule(**arguments)


class Manual(Mean):
    """Steps by itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Fetching(Mean):
    """Fetches its batches by itself."""

    def training_step(self, dataloader_iter):
        raise AssertionError


REFUSED = {
    "manual optimization": (Manual, (), {}, "got Manual with automatic_optimization=False"),
    "a fetching module": (Fetching, (), {}, "got a training_step that fetches them from dataloader_iter"),
    "a Trainer that accumulates": (Mean, (), {"accumulate_grad_batches": 2}, "(accumulate_grad_batches=2)"),
    "an accumulation of epochs": (
        Mean,
        (GradientAccumulationScheduler({0: 1, 1: 2}),),
        {},
        "BatchSizeSchedule and GradientAccumulationScheduler are mutually exclusive",
    ),
    "a search of rates": (
        Mean,
        (LearningRateFinder(),),
        {},
        "BatchSizeSchedule and LearningRateFinder are mutually exclusive",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize("position", [0, 1], ids=["before", "after"])
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_whatever_else_decides_on_the_batches_of_a_step(tmp_path, name, position):
    module, others, options, message = REFUSED[name]
    callbacks = list(others)
    callbacks.insert(position, BatchSizeSchedule({0: 2}))
    trainer = walker(tmp_path, *callbacks, **options)
    for _ in range(2):
        with pytest.raises(MisconfigurationException, match=re.escape(message)):
            trainer.fit(module())


def test_refuses_batch_sizes_that_the_loader_cannot_give(tmp_path):
    with pytest.raises(MisconfigurationException) as raised:
        walker(tmp_path, BatchSizeSchedule({0: 4, 1: 9, 2: 3})).fit(Mean())
    assert "multiples of 2 = 2 per device x 1 replica, got [3, 9]" in str(raised.value)
    assert "at most 1 sample on" in str(raised.value)


def test_a_loader_without_a_batch_size_needs_the_argument(tmp_path):
    module = Mean()
    module.train_dataloader = lambda: DataLoader(numbers().unflatten(0, (-1, SIZE)), batch_size=None)
    with pytest.raises(ValueError, match="batch_size must be given where the train loader has none"):
        walker(tmp_path, BatchSizeSchedule({0: 6})).fit(module)
    walker(tmp_path, BatchSizeSchedule({0: 6, 1: 4}, batch_size=SIZE)).fit(module)
    assert module.stepped == close(Reference({0: 6, 1: 4}, "steps").stepped)


def test_a_batch_size_larger_than_an_epoch_warns(tmp_path):
    with pytest.warns(UserWarning, match="schedules a batch size of 24, and an epoch has 22 samples"):
        walker(tmp_path, BatchSizeSchedule({0: 2, 3: 24})).fit(Mean())


def test_a_dry_run_takes_its_steps_without_a_warning(tmp_path):
    module = Mean()
    walker(tmp_path, BatchSizeSchedule({0: 6}), fast_dev_run=2).fit(module)
    assert module.stepped == close(Reference({0: 6}, "steps", epochs=1, batches=2).stepped)


YAML = {
    "batch_sizes: {0: 4, 2: 6}": {0: 4, 2: 6},
    "{start: 2, increment: 4, every: 3, end: 12, unit: samples}": {0: 2, 3: 6, 6: 10, 9: 12},
    "{start: 2, factor: 2, every: 3, end: 8, batch_size: 2}": {0: 2, 3: 4, 6: 8},
}


@pytest.mark.parametrize("arguments", YAML)
def test_is_named_in_a_configuration(tmp_path, arguments):
    entry = {"class_path": "lightning_lars.BatchSizeSchedule", "init_args": yaml.safe_load(arguments)}
    settings = {"trainer": {"callbacks": [entry], "logger": False, "accelerator": "cpu"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    args = ["--config", str(tmp_path / "config.yaml")]
    cli = LightningCLI(Mean, run=False, args=args, seed_everything_default=False)
    [schedule] = [each for each in cli.trainer.callbacks if isinstance(each, BatchSizeSchedule)]
    assert schedule.batch_sizes == YAML[arguments]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_the_accumulated_batches_of_a_step_travel_to_other_processes(duplicate):
    accumulated = duplicate(AccumulatedBatches(3, first=4))
    assert (accumulated, accumulated.first, accumulated.end) == (3, 4, 7)
    assert [index % accumulated for index in range(4, 9)] == [0, 1, 2, 0, 1]
