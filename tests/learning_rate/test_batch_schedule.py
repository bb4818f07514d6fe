"""Growth of the batch size, and the steps that epochs take."""

import random

import pytest

from lightning_lars.learning_rate import additive_growth, multiplicative_growth
from lightning_lars.learning_rate.batch_schedule import BatchSizes, Progress


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize(("start", "end", "growth"), [(1, 1, 1), (3, 29, 4), (3, 27, 4), (5, 6, 90)])
def test_growth_is_that_of_the_formulas(start, end, growth, every):
    added = BatchSizes(additive_growth(start, end, growth, every), "steps")
    multiplied = BatchSizes(multiplicative_growth(start, end, growth + 1, every), "steps")
    for step in range(40 * every):
        grown = step // every
        assert added.after(Progress(step, 0)) == min(start + growth * grown, end)
        assert multiplied.after(Progress(step, 0)) == min(start * (growth + 1) ** grown, end)


def one_by_one(batch_sizes, unit, batches, samples_per_batch, epochs):
    """The steps and samples after every epoch, batch by batch."""
    steps = samples = 0
    for _ in range(epochs):
        left = batches
        while left:
            position = steps if unit == "steps" else samples
            size = batch_sizes[max(begin for begin in batch_sizes if begin <= position)]
            taken = min(left, size // samples_per_batch)
            left -= taken
            steps += 1
            samples += taken * samples_per_batch
        yield Progress(steps, samples)


@pytest.mark.parametrize("unit", ["steps", "samples"])
@pytest.mark.parametrize("seed", range(20))
def test_epochs_take_the_steps_that_they_take_one_by_one(seed, unit):
    rng = random.Random(seed)
    samples_per_batch, batches = rng.randint(1, 3), rng.randint(1, 60)
    begins = [0, *rng.sample(range(1, 300), rng.randint(0, 8))]
    batch_sizes = {begin: samples_per_batch * rng.randint(1, 9) for begin in begins}
    schedule, progress = BatchSizes(batch_sizes, unit), Progress(0, 0)
    for told in one_by_one(batch_sizes, unit, batches, samples_per_batch, epochs=12):
        progress = schedule.epoch(progress, batches, samples_per_batch)
        assert progress == told
