"""Scaling of the learning rate with the effective batch size, and errors."""

import math
import re
import warnings
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_lars import LARS, BatchSizeScaling
from tests.support.walk import BATCH_SIZE, BATCHES, RATES, Walk, scaled, walk

BASE = 3
SAMPLES = BATCHES * BATCH_SIZE
RULES = {"linear": 1.0, "sqrt": 0.5, "none": 0.0, 0.25: 0.25, 2: 2.0}


def close(rates):
    return [pytest.approx(step, rel=1e-12, abs=1e-14) for step in rates]


def times(*factors):
    """The rates of steps with these factors."""
    return close(scaled([RATES] * len(factors), factors))


@pytest.mark.parametrize("accumulated", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_multiplies_by_the_factor_of_the_rule(tmp_path, rule, accumulated):
    module = walk(tmp_path, Walk(), BatchSizeScaling(BASE, rule), accumulate_grad_batches=accumulated)
    factor = (BATCH_SIZE * accumulated / BASE) ** RULES[rule]
    assert module.rates() == times(*[factor] * (2 * BATCHES // accumulated))


@pytest.mark.filterwarnings("ignore:BatchSizeScaling multiplies the learning rate by")
def test_the_base_batch_size_is_256(tmp_path):
    module = walk(tmp_path, Walk(), BatchSizeScaling())
    assert module.rates() == times(*[BATCH_SIZE / 256] * 2 * BATCHES)


def test_a_batch_size_that_is_given_is_believed(tmp_path):
    module = walk(tmp_path, Walk(), BatchSizeScaling(BASE, batch_size=12), accumulate_grad_batches=2)
    assert module.rates() == times(*[24 / BASE] * BATCHES)


def small_rates(run):
    """The warnings of rates that nearly vanish."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    texts = [str(each.message) for each in caught]
    return [text for text in texts if text.startswith("BatchSizeScaling multiplies")]


@pytest.mark.parametrize(
    ("scaling", "accumulated", "factor"),
    [
        (BatchSizeScaling(), 1, "0.00781"),
        (BatchSizeScaling(), 4, "0.0312"),
        (BatchSizeScaling(17), 1, "0.118"),
        (BatchSizeScaling(rule="sqrt"), 1, "0.0884"),
        (BatchSizeScaling(16), 1, None),
        (BatchSizeScaling(rule="none"), 1, None),
        (BatchSizeScaling(rule="sqrt"), 4, None),
        (BatchSizeScaling(batch_size=2), 1, None),
    ],
)
def test_a_rate_that_nearly_vanishes_by_a_batch_size_that_was_read_warns_once(
    tmp_path, scaling, accumulated, factor
):
    (*texts,) = small_rates(lambda: walk(tmp_path, Walk(), scaling, accumulate_grad_batches=accumulated))
    assert len(texts) == (factor is not None)
    for text in texts:
        assert (
            f"by {factor}, because the effective batch size {BATCH_SIZE * accumulated} is far below" in text
        )
        assert f"base_batch_size={scaling.base_batch_size}." in text
        assert "pass the samples as batch_size" in text


def test_a_rate_that_nearly_vanishes_warns_in_every_fit(tmp_path):
    scaling = BatchSizeScaling()
    for _ in range(2):
        assert len(small_rates(lambda: walk(tmp_path, Walk(), scaling))) == 1


def test_a_rate_that_nearly_vanishes_by_the_size_of_the_first_batch_warns(tmp_path):
    module = Walk()
    module.train_dataloader = lambda: DataLoader([torch.zeros(2, 1)] * 4, batch_size=None)
    (text,) = small_rates(lambda: walk(tmp_path, module, BatchSizeScaling(64)))
    assert "by 0.0312, because the effective batch size 2 is far below base_batch_size=64" in text


def test_follows_a_gradient_accumulation_scheduler_at_its_epochs(tmp_path):
    accumulation = GradientAccumulationScheduler({0: 1, 1: 2, 3: 4})
    module = walk(tmp_path, Walk(), BatchSizeScaling(BASE), accumulation, max_epochs=4)
    steps = {1: BATCHES, 2: BATCHES, 4: BATCHES // 4}
    factors = [BATCH_SIZE * each / BASE for each, count in steps.items() for _ in range(count)]
    assert module.rates() == times(*factors)


class Growing(Walk):
    """Has larger batches in its second epoch."""

    def train_dataloader(self):
        self.batch_size = BATCH_SIZE * (1 + self.trainer.current_epoch)
        return super().train_dataloader()


def test_follows_a_loader_that_is_reloaded_with_another_batch_size(tmp_path):
    module = walk(tmp_path, Growing(), BatchSizeScaling(BASE), reload_dataloaders_every_n_epochs=1)
    assert module.rates() == times(*[BATCH_SIZE / BASE] * BATCHES, *[2 * BATCH_SIZE / BASE] * (BATCHES // 2))


class Batches:
    """A sampler of batches that does not tell their size."""

    def __init__(self, size=BATCH_SIZE):
        self.size = size

    def __iter__(self):
        return iter(BatchSampler(range(SAMPLES), self.size, drop_last=False))

    def __len__(self):
        return math.ceil(SAMPLES / self.size)


class Stream(IterableDataset):
    """Yields whole batches."""

    def __iter__(self):
        return iter(torch.zeros(BATCHES, 4, 1))


class Plain:
    """Is no DataLoader."""

    def __iter__(self):
        return iter(torch.zeros(BATCHES, 5, 1))


DATA = torch.zeros(SAMPLES, 1)
LOADERS = {
    "batch sampler": (lambda: DataLoader(DATA, batch_sampler=BatchSampler(range(SAMPLES), 4, False)), 4),
    "sampler of batches": (
        lambda: DataLoader(
            DATA, batch_size=None, sampler=BatchSampler(SequentialSampler(DATA), 4, drop_last=False)
        ),
        4,
    ),
    "sampler that does not tell": (lambda: DataLoader(DATA, batch_sampler=Batches(6)), 6),
    "stream of batches": (lambda: DataLoader(Stream(), batch_size=None), 4),
    "no loader of torch": (Plain, 5),
    "two loaders": (lambda: {"a": DataLoader(DATA, batch_size=4), "b": DataLoader(DATA, batch_size=6)}, 10),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_finds_the_batch_size_before_the_first_step(tmp_path, loader):
    build, batch_size = LOADERS[loader]
    module = Walk()
    module.train_dataloader = build
    walk(tmp_path, module, BatchSizeScaling(BASE))
    assert module.rates() == times(*[batch_size / BASE] * len(module.rates()))
    assert len(module.rates()) > 2


class GrowingUntold(Walk):
    """Has larger batches in its second epoch, and a loader that does not tell."""

    def train_dataloader(self):
        return DataLoader(DATA, batch_sampler=Batches(2 + 2 * self.trainer.current_epoch))


def test_follows_a_reloaded_loader_without_a_batch_size(tmp_path):
    module = walk(tmp_path, GrowingUntold(), BatchSizeScaling(BASE), reload_dataloaders_every_n_epochs=1)
    assert module.rates() == times(*[2 / BASE] * 12, *[4 / BASE] * 6)


class Batch:
    """Has no size."""


class Objects(IterableDataset):
    """Yields batches without a size."""

    def __iter__(self):
        return iter([Batch(), Batch()])


def test_says_what_to_pass_where_the_batch_size_is_unknown(tmp_path):
    module = Walk()
    module.train_dataloader = lambda: DataLoader(Objects(), batch_size=None)
    with pytest.raises(MisconfigurationException, match="nor in the first batch, a Batch: pass batch_size"):
        walk(tmp_path, module, BatchSizeScaling(BASE))
    assert module.position() == (1.0, 1.0)


def test_several_loaders_must_have_batch_sizes(tmp_path):
    module = Walk()
    module.train_dataloader = lambda: [
        DataLoader(DATA, batch_size=4),
        DataLoader(DATA, batch_sampler=Batches(6)),
    ]
    with pytest.raises(ValueError, match="batch_size must be given where the train loader has none"):
        walk(tmp_path, module, BatchSizeScaling(BASE))
    assert module.position() == (1.0, 1.0)


def test_a_second_fit_checks_its_own_first_batch(tmp_path):
    scaling = BatchSizeScaling(BASE)
    module = Walk()
    module.train_dataloader = lambda: DataLoader(DATA, batch_sampler=Batches(2))
    walk(tmp_path, module, scaling)
    module.train_dataloader = lambda: DataLoader(DATA, batch_sampler=Batches(6))
    walk(tmp_path, module, scaling)
    assert module.rates() == times(*[6 / BASE] * 8)


class Uneven(Walk):
    """Has another gradient on every batch, so that Adam's betas matter."""

    def training_step(self, batch, batch_idx):
        return (self.a + self.b) * (1 + batch_idx % 5)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_adam_sqrt_steps_as_adam_with_the_scaled_betas_and_eps(tmp_path, accumulated):
    ratio = BATCH_SIZE * accumulated / BASE
    betas, eps = (0.9, 0.99), 0.5
    adam = partial(torch.optim.AdamW, betas=betas, eps=eps)
    module = walk(
        tmp_path, Uneven(adam), BatchSizeScaling(BASE, "adam_sqrt"), accumulate_grad_batches=accumulated
    )

    def by_hand(groups):
        groups = [{**group, "lr": group["lr"] * math.sqrt(ratio)} for group in groups]
        scaled_betas = tuple(1 - ratio * (1 - beta) for beta in betas)
        return torch.optim.AdamW(groups, betas=scaled_betas, eps=eps / math.sqrt(ratio))

    expected = walk(tmp_path, Uneven(by_hand), accumulate_grad_batches=accumulated)
    assert module.path == close(expected.path)


def test_adam_sqrt_leaves_the_plain_betas_and_eps_in_checkpoints(tmp_path):
    adam = partial(torch.optim.AdamW, betas=(0.9, 0.99), eps=0.5)
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    walk(tmp_path, Walk(adam), BatchSizeScaling(BASE, "adam_sqrt"), every_step, max_steps=3)
    for step in (1, 2, 3):
        groups = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["optimizer_states"][0]
        assert [group["betas"] for group in groups["param_groups"]] == [(0.9, 0.99)] * 2
        assert [group["eps"] for group in groups["param_groups"]] == [0.5] * 2


def test_says_what_it_found_and_did(tmp_path, caplog):
    with caplog.at_level("INFO"):
        walk(tmp_path, Walk(), BatchSizeScaling(BASE, "sqrt"), accumulate_grad_batches=3)
    found = "effective batch size 6 = 2 per device x 1 replica x 3 accumulated; sqrt from 3"
    did = "learning rate x 1.41421 (SGD 0.01 -> 0.0141421, SGD 0.003 -> 0.00424264)"
    (said,) = [record.message for record in caplog.records if "BatchSizeScaling" in record.message]
    assert found in said
    assert did in said


def test_says_so_when_the_accumulation_changes(tmp_path, caplog):
    with caplog.at_level("INFO"):
        walk(
            tmp_path,
            Walk(),
            BatchSizeScaling(BASE),
            GradientAccumulationScheduler({0: 1, 2: 3}),
            max_epochs=4,
        )
    said = [record.message for record in caplog.records if "BatchSizeScaling" in record.message]
    assert ["effective batch size 2 " in each for each in said] == [True, False]
    assert ["effective batch size 6 " in each for each in said] == [False, True]


class Normed(Walk):
    """Has a batch norm, whose statistics are averaged in an epoch of their own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = torch.nn.BatchNorm1d(1)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0 * self.norm(batch).sum()


@pytest.mark.parametrize("order", ["averaging first", "scaling first"])
@pytest.mark.parametrize("sized", [True, False])
def test_an_epoch_without_steps_is_left_at_the_rate_of_the_one_before(tmp_path, caplog, order, sized):
    """The one that StochasticWeightAveraging adds."""
    averaging = StochasticWeightAveraging(swa_lrs=[0.5, 0.5], swa_epoch_start=1, annealing_epochs=1)
    monitor = LearningRateMonitor("step")
    callbacks = [averaging, BatchSizeScaling(BASE)]
    module = Normed()
    if not sized:
        module.train_dataloader = lambda: DataLoader(DATA, batch_sampler=Batches(2))
    options = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    with caplog.at_level("INFO"):
        walk(tmp_path, module, *callbacks[:: 1 if order == "averaging first" else -1], monitor, **options)
    said = [record.message for record in caplog.records if "BatchSizeScaling" in record.message]
    assert ["2 per device x 1 replica x 1 accumulated" in each for each in said] == [True]
    rates = monitor.lrs["lr-SGD/pg1"]
    assert len(rates) == 3 * BATCHES
    assert set(rates[2 * BATCHES :]) == {rates[2 * BATCHES - 1]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_batch_size": 0}, "base_batch_size must be an integer above 0, got 0"),
        ({"base_batch_size": -256}, "base_batch_size must be an integer above 0, got -256"),
        ({"base_batch_size": 2.5}, "base_batch_size must be an integer above 0, got 2.5"),
        ({"base_batch_size": True}, "base_batch_size must be an integer above 0, got True"),
        ({"batch_size": 0}, "batch_size must be an integer above 0, got 0"),
        ({"batch_size": 1.5}, "batch_size must be an integer above 0, got 1.5"),
        ({"batch_size": "8"}, "batch_size must be an integer above 0, got '8'"),
        ({"rule": "cubic"}, "rule must be one of ('linear', 'sqrt', 'adam_sqrt', 'none') or an exponent"),
        ({"rule": "cubic"}, "got 'cubic'"),
        ({"rule": math.nan}, "or an exponent, got nan"),
        ({"rule": math.inf}, "or an exponent, got inf"),
        ({"rule": True}, "or an exponent, got True"),
        ({"rule": None}, "or an exponent, got None"),
        ({"rule": [1]}, "or an exponent, got [1]"),
    ],
)
def test_refuses_a_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BatchSizeScaling(**arguments)


TINY_BETAS = partial(torch.optim.AdamW, betas=(0.5, 0.9))


@pytest.mark.parametrize(
    ("optimizer", "callbacks", "message"),
    [
        (
            torch.optim.SGD,
            lambda: [BatchSizeScaling(BASE), BatchSizeScaling(BASE)],
            "The Trainer has two callbacks for the batch-size scaling of the learning rate: remove one",
        ),
        (
            torch.optim.SGD,
            lambda: [BatchSizeScaling(BASE), LearningRateFinder()],
            "BatchSizeScaling and LearningRateFinder are mutually exclusive",
        ),
        (
            torch.optim.SGD,
            lambda: [LearningRateFinder(), BatchSizeScaling(BASE)],
            "BatchSizeScaling and LearningRateFinder are mutually exclusive",
        ),
        (
            LARS,
            lambda: [BatchSizeScaling(BASE, "adam_sqrt")],
            'BatchSizeScaling(rule="adam_sqrt") needs an optimizer with betas and eps, got LARS',
        ),
        (
            TINY_BETAS,
            lambda: [BatchSizeScaling(1, "adam_sqrt", batch_size=3)],
            'rule="adam_sqrt" holds up to 2 times the base batch size with betas=(0.5, 0.9), got 3 times',
        ),
    ],
)
def test_refuses_a_run_that_it_does_not_fit_before_the_first_step(tmp_path, optimizer, callbacks, message):
    module = Walk(optimizer)
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        walk(tmp_path, module, *callbacks())
    assert module.position() == (1.0, 1.0)


def test_refuses_a_first_batch_too_large_for_adam_before_the_first_step(tmp_path):
    module = Walk(TINY_BETAS)
    module.train_dataloader = lambda: DataLoader(DATA, batch_sampler=Batches(6))
    with pytest.raises(MisconfigurationException, match="holds up to 2 times the base batch size"):
        walk(tmp_path, module, BatchSizeScaling(2, "adam_sqrt"))
    assert module.position() == (1.0, 1.0)
