"""A batch size that grows as far as the critical one, as it is measured."""

import math
import re
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_lars import (
    BatchSizeSchedule,
    GradientNoiseScale,
    LargeBatchMixin,
    LearningRateWarmup,
    WarmupDecayLR,
)
from lightning_lars.trainer.logging import is_logging, publish
from lightning_lars.trainer.training_length import total_steps
from tests.support.mean import SIZE, Mean
from tests.support.walk import walker

KEY = "gradient_noise_scale/B_simple"
SAMPLES = 128


class Long(Mean):
    """Epochs of 64 batches of 2 numbers, of mean 0.2 and variance 1: their noise scale is about 25."""

    def train_dataloader(self):
        noise = torch.randn(SAMPLES, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        return DataLoader(0.2 + (noise - noise.mean()) / noise.std(), batch_size=SIZE)

    def sizes_of_steps(self):
        """The batch size of each step, by the batches that it took."""
        steps = [steps for _, steps in self.accumulated]
        first = [steps.index(step) for step in sorted(set(steps))[1:]]
        return [SIZE * (b - a) for a, b in zip([-1, *first], first, strict=False)]


class Told(GradientNoiseScale):
    """Publishes the noise scale that it is told, when it would publish what it measures."""

    def __init__(self, by_step):
        super().__init__()
        self.by_step = by_step

    def on_train_batch_end(self, trainer, *_):
        if is_logging(trainer) and trainer.global_step in self.by_step:
            publish(trainer, {KEY: self.by_step[trainer.global_step]})


LADDER = {"start": 4, "factor": 2, "every": 3, "end": 16, "noise_scale": 1.0}


def filled(*sizes):
    """These batch sizes, and the last one again until the epoch ends."""
    left = SAMPLES - sum(sizes)
    rest = [left % sizes[-1]] if left % sizes[-1] else []
    return [*sizes, *[sizes[-1]] * (left // sizes[-1]), *rest]


CASES = {
    "nothing measured": ({}, {}, filled(4)),
    "too little": ({1: 7.99}, {}, filled(4)),
    "just enough": ({1: 8.0}, {}, filled(4, 4, 4, 8)),
    "one batch size at a time, each for its steps": ({1: 99.0}, {}, filled(4, 4, 4, 8, 8, 8, 16)),
    "late": ({5: 8.0}, {}, filled(4, 4, 4, 4, 4, 8)),
    "what was reached stays": ({2: 16.0, 4: 2.0}, {}, filled(4, 4, 4, 8)),
    "until there is more": ({2: 16.0, 4: 2.0, 8: 16.0}, {}, filled(4, 4, 4, 8, 8, 8, 8, 8, 16)),
    "twice as much is asked for": ({1: 16.0}, {"noise_scale": 2.0}, filled(4, 4, 4, 8)),
    "half as much": ({1: 4.0}, {"noise_scale": 0.5}, filled(4, 4, 4, 8)),
    "by samples": ({1: 99.0}, {"unit": "samples", "every": 10}, filled(4, 4, 4, 8, 8, 16)),
    "by increments": ({1: 99.0}, {"factor": None, "increment": 4, "end": 12}, filled(4, 4, 4, 8, 8, 8, 12)),
}


@pytest.mark.parametrize("case", CASES)
def test_grows_when_the_noise_scale_has_reached_the_next_batch_size(tmp_path, case):
    by_step, changes, told = CASES[case]
    module = Long()
    schedule = BatchSizeSchedule(**{**LADDER, **changes})
    walker(tmp_path, Told(by_step), schedule, max_epochs=1, log_every_n_steps=1).fit(module)
    assert module.sizes_of_steps() == told


@pytest.mark.filterwarnings("ignore:.*when using `ckpt_path`, callbacks used to create the checkpoint")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_grows_as_the_uninterrupted_one(tmp_path):
    straight = Long()
    every_step = ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    callbacks = Told({1: 99.0}), BatchSizeSchedule(**LADDER), every_step
    walker(tmp_path, *callbacks, max_epochs=1, log_every_n_steps=1).fit(straight)
    for steps in (2, 4, 6):
        resumed = Long()
        trainer = walker(tmp_path, Told({}), BatchSizeSchedule(**LADDER), max_epochs=1)
        trainer.fit(resumed, ckpt_path=tmp_path / f"step={steps}.ckpt")
        assert resumed.sizes_of_steps() == straight.sizes_of_steps()[steps:]


def test_grows_as_far_as_the_measured_critical_batch_size(tmp_path):
    noise_scale = GradientNoiseScale(every_n_steps=1, decay=0.95)
    schedule = BatchSizeSchedule(start=4, factor=2, every=20, end=64, noise_scale=1.0)
    module = Long()
    trainer = walker(tmp_path, noise_scale, schedule, max_epochs=6, log_every_n_steps=1)
    trainer.fit(module)
    assert 16 < trainer.callback_metrics[KEY] < 32
    assert sorted(set(module.sizes_of_steps())) == [4, 8, 16]


def test_the_number_of_steps_is_unknown_beforehand(tmp_path):
    module, lengths = Long(), []
    module.on_train_start = lambda: lengths.append(total_steps(module.trainer))
    callbacks = Told({}), BatchSizeSchedule(**LADDER)
    walker(tmp_path, *callbacks, LearningRateWarmup(warmup_steps=4)).fit(module)
    assert lengths == [math.inf]
    with pytest.raises(MisconfigurationException, match="or the batch sizes follow the noise scale: pass w"):
        walker(tmp_path, *callbacks, LearningRateWarmup(warmup_fraction=0.5)).fit(Long())
    decaying = Decaying(optimizer=torch.optim.SGD, lr_scheduler=partial(WarmupDecayLR, warmup_steps=0))
    with pytest.raises(MisconfigurationException, match="or its batch sizes follow the noise scale: pass it"):
        walker(tmp_path, *callbacks).fit(decaying)


class Decaying(LargeBatchMixin, Long):
    """With a scheduler that needs to know the length of the run."""

    configure_optimizers = LargeBatchMixin.configure_optimizers


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([BatchSizeSchedule(**LADDER)], "needs a measured noise scale: add GradientNoiseScale()"),
        (
            [GradientNoiseScale(), BatchSizeSchedule(**{**LADDER, "start": 2})],
            "got a batch size of 2, and 2 per device: halve the loader's batch size",
        ),
    ],
)
def test_refuses_what_measures_no_noise_scale(tmp_path, callbacks, message):
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        walker(tmp_path, *callbacks).fit(Long())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({**LADDER, "noise_scale": 0}, "noise_scale must be above 0 and finite, got 0"),
        ({**LADDER, "noise_scale": math.inf}, "noise_scale must be above 0 and finite, got inf"),
        (
            {"batch_sizes": {0: 8, 3: 4}, "noise_scale": 1.0},
            "batch_sizes must be ascending with noise_scale, got {0: 8, 3: 4}",
        ),
    ],
)
def test_an_argument_that_breaks_its_rule_is_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BatchSizeSchedule(**arguments)
