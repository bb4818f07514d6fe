"""The scaling rules, and the batch size that one optimizer step averages over."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_lars import effective_batch_size
from lightning_lars.trainer.batch_size import scale_adam, scaling_factor
from tests.support.walk import BATCHES, Walk, walk

DATA = torch.zeros(24, 1)
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
def test_adam_forgets_in_as_many_samples_as_before(beta1, beta2, ratio):
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


class Batches:
    """A sampler of batches that does not tell their size."""

    def __iter__(self):
        return iter(BatchSampler(range(24), 6, drop_last=False))

    def __len__(self):
        return 4


class Stream(IterableDataset):
    """Yields samples, or batches if it has a batch size."""

    def __init__(self, batch_size=None):
        if batch_size:
            self.batch_size = batch_size

    def __iter__(self):
        return iter(torch.zeros(12, getattr(self, "batch_size", 1), 1))


class Measured(Walk):
    """Asks for the effective batch size at the start of every epoch."""

    def __init__(self, loader=None):
        super().__init__()
        self.loader = loader
        self.sizes = []

    def train_dataloader(self):
        return self.loader() if self.loader else super().train_dataloader()

    def on_train_epoch_start(self):
        self.sizes.append(effective_batch_size(self.trainer))


LOADERS = {
    "batch size": (lambda: DataLoader(DATA, batch_size=4), 4),
    "batch sampler": (lambda: DataLoader(DATA, batch_sampler=BatchSampler(range(24), 5, False)), 5),
    "sampler of batches": (
        lambda: DataLoader(DATA, batch_size=None, sampler=BatchSampler(SequentialSampler(DATA), 3, False)),
        3,
    ),
    "stream": (lambda: DataLoader(Stream(), batch_size=4), 4),
    "stream of batches that tells": (lambda: DataLoader(Stream(7), batch_size=None), 7),
    "list": (lambda: [DataLoader(DATA, batch_size=4), DataLoader(DATA, batch_size=6)], 10),
    "dict": (lambda: {"a": DataLoader(DATA, batch_size=4), "b": DataLoader(DATA, batch_size=6)}, 10),
    "nested": (
        lambda: {
            "a": DataLoader(DATA, batch_size=4),
            "b": [DataLoader(DATA, batch_size=6), DataLoader(DATA, batch_size=1)],
        },
        11,
    ),
    "combined": (
        lambda: CombinedLoader([DataLoader(DATA, batch_size=4), DataLoader(DATA, batch_size=2)], "min_size"),
        6,
    ),
}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("loader", LOADERS)
def test_counts_the_samples_of_a_step(tmp_path, loader, accumulated):
    build, batch_size = LOADERS[loader]
    module = walk(tmp_path, Measured(build), accumulate_grad_batches=accumulated)
    assert module.sizes == [batch_size * accumulated] * 2


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(DATA, batch_sampler=Batches()),
        lambda: DataLoader(Stream(), batch_size=None),
        lambda: [DataLoader(DATA, batch_size=4), DataLoader(DATA, batch_sampler=Batches())],
    ],
)
def test_says_what_to_pass_where_the_loader_does_not_tell(tmp_path, loader):
    message = "batch_size must be given where the train loader does not tell it, got a DataLoader"
    with pytest.raises(ValueError, match=message):
        walk(tmp_path, Measured(loader))


class Told(Measured):
    """Tells the batch size that its loader does not."""

    def on_train_epoch_start(self):
        self.sizes.append(effective_batch_size(self.trainer, batch_size=6))


def test_a_batch_size_that_is_given_is_believed(tmp_path):
    module = Told(lambda: DataLoader(DATA, batch_sampler=Batches()))
    assert walk(tmp_path, module, accumulate_grad_batches=3).sizes == [18, 18]


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True])
def test_refuses_a_bad_batch_size(tmp_path, batch_size):
    class Wrong(Walk):
        def on_train_start(self):
            effective_batch_size(self.trainer, batch_size=batch_size)

    with pytest.raises(ValueError, match=f"batch_size must be a whole number above 0, got {batch_size}"):
        walk(tmp_path, Wrong())


def test_follows_a_gradient_accumulation_scheduler(tmp_path):
    accumulation = GradientAccumulationScheduler({0: 1, 1: 3, 3: 4})
    assert walk(tmp_path, Measured(), accumulation, max_epochs=4).sizes == [2, 6, 6, 8]


@pytest.mark.parametrize(("accumulated", "size"), [(BATCHES, 2 * BATCHES), (BATCHES + 1, 2 * BATCHES)])
def test_the_end_of_an_epoch_ends_the_accumulation(tmp_path, accumulated, size):
    assert walk(tmp_path, Measured(), accumulate_grad_batches=accumulated).sizes == [size, size]


class Growing(Measured):
    """Has larger batches in its second epoch."""

    def train_dataloader(self):
        self.batch_size = 2 * (1 + self.trainer.current_epoch)
        return super().train_dataloader()


def test_follows_a_loader_that_is_reloaded(tmp_path):
    assert walk(tmp_path, Growing(), reload_dataloaders_every_n_epochs=1).sizes == [2, 4]


def test_follows_the_batch_size_finder(tmp_path):
    module = walk(tmp_path, Measured(), BatchSizeFinder(max_trials=2, steps_per_trial=1))
    assert module.batch_size > 2
    # The trials of the finder ask before the two epochs do.
    assert module.sizes[-2:] == [module.batch_size] * 2


class AsksEarly(Walk):
    """Asks while it configures its optimizers, before Lightning has loaded the data."""

    def configure_optimizers(self):
        self.size = effective_batch_size(self.trainer)
        return super().configure_optimizers()


def test_is_known_where_optimizers_are_configured(tmp_path):
    module = walk(tmp_path, AsksEarly(), accumulate_grad_batches=3)
    assert module.size == 6
