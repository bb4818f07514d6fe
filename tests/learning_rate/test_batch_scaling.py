"""The rules that scale the learning rate with the batch size."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lars.learning_rate.batch_scaling import scale_adam, scaling_factor

sizes = st.integers(1, 2**20)
exponents = st.floats(-3, 3)


@given(sizes, sizes)
def test_the_named_rules_are_powers_of_the_ratio(batch_size, base):
    assert scaling_factor(batch_size, base, "linear") == batch_size / base
    assert scaling_factor(batch_size, base, "sqrt") == pytest.approx(math.sqrt(batch_size / base), rel=1e-15)
    assert scaling_factor(batch_size, base, "adam_sqrt") == scaling_factor(batch_size, base, "sqrt")
    assert scaling_factor(batch_size, base, "none") == 1.0


@given(sizes, sizes, exponents)
def test_an_exponent_is_a_rule(batch_size, base, exponent):
    factor = scaling_factor(batch_size, base, exponent)
    assert factor == pytest.approx(math.exp(exponent * math.log(batch_size / base)), rel=1e-12)


@given(sizes, st.sampled_from(["linear", "sqrt", "adam_sqrt", "none"]) | exponents)
def test_the_base_batch_size_is_scaled_by_one(base, rule):
    assert scaling_factor(base, base, rule) == 1.0


@given(sizes, sizes, sizes, st.sampled_from(["linear", "sqrt"]) | exponents)
def test_two_scalings_are_one(first, second, third, rule):
    both = scaling_factor(second, first, rule) * scaling_factor(third, second, rule)
    assert both == pytest.approx(scaling_factor(third, first, rule), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 256, "linear"), "batch_size must be above 0, got 0"),
        ((-4, 256, "linear"), "batch_size must be above 0, got -4"),
        ((math.inf, 256, "linear"), "batch_size must be above 0, got inf"),
        ((math.nan, 256, "linear"), "batch_size must be above 0, got nan"),
        ((8, 0, "linear"), "base_batch_size must be above 0, got 0"),
        ((8, -256, "linear"), "base_batch_size must be above 0, got -256"),
        ((8, 256, "cubic"), "rule must be one of ('linear', 'sqrt', 'adam_sqrt', 'none') or an exponent"),
        ((8, 256, None), "or an exponent, got None"),
        ((8, 256, True), "or an exponent, got True"),
        ((8, 256, math.nan), "or an exponent, got nan"),
    ],
)
def test_refuses_a_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        scaling_factor(*arguments)


@given(st.floats(0.5, 0.9999), st.floats(0.5, 0.9999), st.floats(0.01, 2.0))
def test_adam_averages_over_the_same_number_of_samples(beta1, beta2, ratio):
    betas, eps = scale_adam((beta1, beta2), 1e-8, ratio)
    assert [1 - beta for beta in betas] == pytest.approx([ratio * (1 - beta1), ratio * (1 - beta2)], rel=1e-9)
    assert eps**2 * ratio == pytest.approx(1e-16, rel=1e-12)
    assert all(0 <= beta < 1 for beta in betas)


def test_adam_stays_as_it_is_at_the_base_batch_size():
    assert scale_adam((0.5, 0.75), 1e-8, 1) == ((0.5, 0.75), 1e-8)


def test_adam_cannot_forget_more_than_everything():
    assert scale_adam((0.5, 0.75), 1e-8, 2)[0] == (0.0, 0.5)
    message = 'rule="adam_sqrt" holds up to 2 times the base batch size with betas=(0.5, 0.75), got 2.5 times'
    with pytest.raises(ValueError, match=re.escape(message)):
        scale_adam((0.5, 0.75), 1e-8, 2.5)
