"""The two-batch estimates, their averages, and their interpretation."""

import math

import numpy as np
import pytest
import torch

from lightning_lars.gradients.noise_scale import MovingNoiseScale, NoiseScale, describe, two_batch_estimates


def measured(values, decay=0.9):
    moving = MovingNoiseScale(decay)
    for trace, gradient in values:
        moving.update(torch.tensor(trace), torch.tensor(gradient))
    return moving


def test_estimates_are_unbiased():
    random = np.random.default_rng(0)
    mean, deviation = np.array([0.5, -0.3, 0.1]), np.array([1.0, 0.4, 2.0])
    batches = mean + deviation * random.standard_normal((50_000, 4, 2, 3))
    small = np.square(batches.mean(2)).sum(-1).mean(1)
    big = np.square(batches.mean((1, 2))).sum(-1)
    trace, gradient = two_batch_estimates(torch.from_numpy(small), torch.from_numpy(big), 2, 8)
    for estimates, truth in ((trace, np.square(deviation).sum()), (gradient, np.square(mean).sum())):
        error = estimates.std().item() / math.sqrt(len(estimates))
        assert abs(estimates.mean().item() - truth) < 4 * error
        assert error < 0.02 * truth


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_averages_are_weighted_by_age(decay):
    values = np.random.default_rng(1).uniform(1, 2, (20, 2))
    weights = decay ** np.arange(19, -1, -1.0)
    trace, gradient = np.average(values, axis=0, weights=weights)
    seen = measured(values.tolist(), decay).read()
    assert (seen.tr_sigma, seen.squared_gradient) == pytest.approx((trace, gradient), rel=1e-6)
    assert seen.b_simple == pytest.approx(trace / gradient, rel=1e-6)


def test_the_standard_error_matches_many_repetitions():
    random = np.random.default_rng(2)
    values = random.multivariate_normal([10.0, 2.0], [[9.0, -0.3], [-0.3, 0.2]], (150, 150))
    moving = [measured(run.tolist(), decay=0.98).read() for run in values]
    spread = np.std([each.b_simple for each in moving])
    assert np.mean([each.standard_error for each in moving]) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("spoiled", [(math.nan, 1.0), (1.0, math.inf)])
def test_non_finite_measurements_are_skipped(spoiled):
    assert measured([(2.0, 1.0), spoiled]).state() == measured([(2.0, 1.0)]).state()


def test_measurements_that_do_not_count_are_skipped():
    moving = measured([(2.0, 1.0)])
    before = moving.state()
    moving.update(torch.tensor(9.0), torch.tensor(9.0), torch.tensor(False))
    assert moving.state() == before


def test_continues_from_its_state():
    values = np.random.default_rng(3).uniform(1, 2, (9, 2)).tolist()
    resumed = MovingNoiseScale(0.9, measured(values[:4]).state())
    for trace, gradient in values[4:]:
        resumed.update(torch.tensor(trace), torch.tensor(gradient))
    assert resumed.state() == measured(values).state()


def test_there_is_no_scale_before_it_is_defined():
    assert MovingNoiseScale(0.9).read() is None
    assert measured([(2.0, 1.0)]).read().standard_error is None
    for values in ((-1.0, 1.0), (1.0, -1.0), (0.0, 0.0)):
        seen = measured([values]).read()
        assert (seen.b_simple, seen.standard_error) == (None, None)


@pytest.mark.parametrize(
    ("measured", "batch_size", "words"),
    [
        (
            NoiseScale(400.0, 1.0, 400.0, 20.0),
            8,
            "8 is a factor of 50 below the critical one, about 400 +- 20: ",
        ),
        (
            NoiseScale(400.0, 1.0, 400.0, 20.0),
            8,
            "twice the batch would take 51% of the steps and 102% of the",
        ),
        (NoiseScale(400.0, 1.0, 400.0, None), 400, "400 is equal to the critical one, about 400: twice"),
        (NoiseScale(400.0, 1.0, 400.0, None), 400, "would take 75% of the steps and 150% of the samples"),
        (
            NoiseScale(400.0, 1.0, 400.0, 20.0),
            8000,
            "8000 is a factor of 20 above the critical one, about 400",
        ),
        (
            NoiseScale(1.9, 1.0, 1.9, 0.2),
            16,
            "16 is a factor of 8.4 above the critical one, about 1.9 +- 0.2: ",
        ),
        (NoiseScale(4.0, -1.0, None, None), 8, "the gradient is lost in the noise"),
        (NoiseScale(-4.0, 1.0, None, None), 8, "the noise is lost in the gradient"),
    ],
)
def test_says_what_it_means(measured, batch_size, words):
    assert words in describe(measured, batch_size)
