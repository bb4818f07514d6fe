"""Length and curve of a warmup, and errors."""

import math
import re
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_lars import BatchSizeScaling, LearningRateWarmup
from tests.support.releases import has
from tests.support.walk import BATCH_SIZE, BATCHES, RATES, Walk, scaled, walk, walker

SHAPES = {
    "constant": lambda start, progress: start,
    "linear": lambda start, progress: start + (1 - start) * progress,
    "exponential": lambda start, progress: start ** (1 - progress),
    "cosine": lambda start, progress: start + (1 - start) * (1 - math.cos(math.pi * progress)) / 2,
}


def close(rates):
    return [pytest.approx(step, rel=1e-12, abs=1e-14) for step in rates]


def warmed(length, steps=2 * BATCHES):
    """The rates of a linear warmup from 0 of this length."""
    return close(scaled([RATES] * steps, [min(1.0, step / length) for step in range(1, steps + 1)]))


@pytest.mark.parametrize("start", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_its_shape_and_then_leaves_the_schedule_alone(tmp_path, shape, start):
    start = start or (0.1 if shape in ("constant", "exponential") else 0.0)
    module = walk(tmp_path, Walk(), LearningRateWarmup(6, shape=shape, start_factor=start))
    factors = [SHAPES[shape](start, step / 6) for step in range(1, 6)] + [1.0] * (2 * BATCHES - 5)
    assert module.rates() == close(scaled([RATES] * 2 * BATCHES, factors))


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_leaves_zero_by_itself(tmp_path, shape):
    module = walk(tmp_path, Walk(), LearningRateWarmup(6, shape=shape))
    factors = [SHAPES[shape](0.0, step / 6) for step in range(1, 6)] + [1.0] * (2 * BATCHES - 5)
    assert module.rates() == close(scaled([RATES] * 2 * BATCHES, factors))


@pytest.mark.parametrize(
    ("warmup", "options", "length"),
    [
        ({"warmup_steps": 5}, {}, 5),
        ({"warmup_steps": 1}, {}, 1),
        ({"warmup_steps": 2 * BATCHES}, {}, 2 * BATCHES),
        ({"warmup_epochs": 1}, {}, BATCHES),
        ({"warmup_epochs": 0.5}, {}, BATCHES / 2),
        ({"warmup_epochs": 1.25}, {}, BATCHES * 5 / 4),
        ({"warmup_epochs": 2}, {}, 2 * BATCHES),
        ({"warmup_epochs": 0.01}, {}, 1),
        ({"warmup_epochs": 1}, {"limit_train_batches": 8}, 8),
        ({"warmup_epochs": 0.5}, {"limit_train_batches": 0.5}, BATCHES / 4),
        ({"warmup_epochs": 1}, {"accumulate_grad_batches": 3}, BATCHES / 3),
        ({"warmup_fraction": 0.25}, {}, BATCHES / 2),
        ({"warmup_fraction": 1.0}, {}, 2 * BATCHES),
        ({"warmup_fraction": 0.5}, {"max_steps": 8}, 4),
        ({"warmup_fraction": 0.5}, {"max_steps": 8, "max_epochs": -1}, 4),
        ({"warmup_fraction": 0.5}, {"accumulate_grad_batches": 3}, BATCHES / 3),
    ],
)
def test_takes_as_many_steps_as_asked(tmp_path, warmup, options, length):
    module = walk(tmp_path, Walk(), LearningRateWarmup(**warmup), **options)
    assert module.rates() == warmed(length, len(module.rates()))
    assert len(module.rates()) >= length


@pytest.mark.parametrize(
    ("warmup", "length"),
    [
        ({"warmup_epochs": 1}, BATCHES),
        ({"warmup_epochs": 2}, BATCHES + BATCHES / 3),
        ({"warmup_epochs": 1.5}, BATCHES + BATCHES / 6),
        ({"warmup_fraction": 1.0}, BATCHES + BATCHES / 3),
        ({"warmup_fraction": 0.5}, BATCHES * 2 / 3),
    ],
)
def test_follows_a_gradient_accumulation_scheduler(tmp_path, warmup, length):
    accumulation = GradientAccumulationScheduler({0: 1, 1: 3})
    module = walk(tmp_path, Walk(), LearningRateWarmup(**warmup), accumulation)
    assert module.rates() == warmed(length, BATCHES + BATCHES // 3)


class Endless(IterableDataset):
    """Never runs out."""

    def __iter__(self):
        while True:
            yield torch.zeros(1)


class EndlessWalk(Walk):
    """Trains on batches without end."""

    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=BATCH_SIZE)


@pytest.mark.parametrize("warmup", [{"warmup_steps": 5}, {"warmup_fraction": 0.5}])
def test_accepts_steps_and_fractions_with_an_endless_loader(tmp_path, warmup):
    module = walk(tmp_path, EndlessWalk(), LearningRateWarmup(**warmup), max_steps=10, max_epochs=-1)
    assert module.rates() == warmed(5, 10)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_with_scaling_by_k_comes_from_the_unscaled_rate(tmp_path, accumulated):
    k, length = BATCH_SIZE * accumulated, 6
    callbacks = LearningRateWarmup(length, start_factor=1 / k), BatchSizeScaling(1)
    module = walk(tmp_path, Walk(), *callbacks, accumulate_grad_batches=accumulated)
    steps = 2 * BATCHES // accumulated
    factors = [1 + (k - 1) * min(1.0, step / length) for step in range(1, steps + 1)]
    assert module.rates() == close(scaled([RATES] * steps, factors))


def test_a_scaled_constant_warmup_takes_its_first_steps_at_the_unscaled_rate(tmp_path):
    warmup = LearningRateWarmup(3, shape="constant", start_factor=1 / BATCH_SIZE)
    module = walk(tmp_path, Walk(), warmup, BatchSizeScaling(1))
    assert module.rates()[:3] == close([RATES, RATES, scaled([RATES], [BATCH_SIZE])[0]])


def test_says_how_long_it_will_take(tmp_path, caplog):
    with caplog.at_level("INFO"):
        walk(tmp_path, Walk(), LearningRateWarmup(warmup_epochs=0.5, start_factor=0.25))
    assert (
        "LearningRateWarmup: linear, from 0.25 to 1 times the learning rate in 6 optimizer steps"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "One of ['warmup_steps', 'warmup_epochs', 'warmup_fraction'] must be given, got none"),
        (
            {"warmup_steps": 5, "warmup_epochs": 1},
            "must be given, got {'warmup_steps': 5, 'warmup_epochs': 1}",
        ),
        (
            {"warmup_fraction": 0.1, "warmup_epochs": 1},
            "must be given, got {'warmup_epochs': 1, 'warmup_fraction': 0.1}",
        ),
        ({"warmup_steps": 0}, "warmup_steps must be an integer above 0, got 0"),
        ({"warmup_steps": -3}, "warmup_steps must be an integer above 0, got -3"),
        ({"warmup_steps": 2.5}, "warmup_steps must be an integer above 0, got 2.5"),
        ({"warmup_steps": True}, "warmup_steps must be an integer above 0, got True"),
        ({"warmup_epochs": 0}, "warmup_epochs must be above 0 and finite, got 0"),
        ({"warmup_epochs": -0.5}, "warmup_epochs must be above 0 and finite, got -0.5"),
        ({"warmup_epochs": math.inf}, "warmup_epochs must be above 0 and finite, got inf"),
        ({"warmup_epochs": math.nan}, "warmup_epochs must be above 0 and finite, got nan"),
        ({"warmup_fraction": 0.0}, "warmup_fraction must be in (0, 1], got 0.0"),
        ({"warmup_fraction": 1.5}, "warmup_fraction must be in (0, 1], got 1.5"),
        ({"warmup_fraction": math.nan}, "warmup_fraction must be in (0, 1], got nan"),
        (
            {"warmup_steps": 5, "shape": "quadratic"},
            "shape must be one of ('constant', 'linear', 'exponential', 'cosine'), got 'quadratic'",
        ),
        ({"warmup_steps": 5, "start_factor": -0.1}, "start_factor must be in [0, 1], got -0.1"),
        ({"warmup_steps": 5, "start_factor": 1.1}, "start_factor must be in [0, 1], got 1.1"),
        ({"warmup_steps": 5, "start_factor": math.nan}, "start_factor must be in [0, 1], got nan"),
        (
            {"warmup_steps": 5, "shape": "constant"},
            "start_factor must be above 0 with shape='constant', got None",
        ),
        (
            {"warmup_steps": 5, "shape": "exponential", "start_factor": 0.0},
            "start_factor must be above 0 with shape='exponential', got 0.0",
        ),
    ],
)
def test_refuses_a_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LearningRateWarmup(**arguments)


@pytest.mark.parametrize(
    ("module", "callbacks", "options", "message"),
    [
        (Walk, [{"warmup_steps": 25}], {}, "would take 25 of the 24 optimizer steps"),
        (Walk, [{"warmup_epochs": 3}], {}, "would take 36 of the 24 optimizer steps"),
        (Walk, [{"warmup_steps": 9}], {"max_steps": 8}, "would take 9 of the 8 optimizer steps"),
        (
            Walk,
            [{"warmup_steps": 9}],
            {"accumulate_grad_batches": 3},
            "would take 9 of the 8 optimizer steps",
        ),
        (
            EndlessWalk,
            [{"warmup_epochs": 0.5}],
            {"max_steps": 8},
            "LearningRateWarmup(warmup_epochs=0.5) has no length in steps, because the train loader or the "
            "run has no end, or the batch sizes follow the noise scale: pass warmup_steps",
        ),
        (
            EndlessWalk,
            [{"warmup_fraction": 0.5}],
            {},
            "LearningRateWarmup(warmup_fraction=0.5) has no length in steps",
        ),
        (
            Walk,
            [{"warmup_fraction": 0.5}],
            {"max_epochs": -1},
            "LearningRateWarmup(warmup_fraction=0.5) has no length in steps",
        ),
        (
            Walk,
            [{"warmup_steps": 5}, {"warmup_steps": 3}],
            {},
            "The Trainer has two callbacks for the warmup of the learning rate: remove one",
        ),
    ],
)
def test_refuses_a_run_that_it_does_not_fit_before_the_first_step(
    tmp_path, module, callbacks, options, message
):
    module = module()
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        walk(tmp_path, module, *(LearningRateWarmup(**each) for each in callbacks), **options)
    assert module.position() == (1.0, 1.0)


class Manual(Walk):
    """Steps every fourth batch, and another optimizer in the rest."""

    automatic_optimization = False

    def configure_optimizers(self):
        rates = zip(self.weights(), RATES, strict=True)
        return [torch.optim.SGD([weight], rate) for weight, rate in rates]

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx % 4 > 0]
        optimizer.zero_grad()
        self.manual_backward(self.a + self.b)
        optimizer.step()


@pytest.mark.parametrize(
    ("warmup", "options"),
    [
        ({"warmup_epochs": 1}, {}),
        ({"warmup_epochs": 0.5}, {"accumulate_grad_batches": 1, "max_steps": 16}),
        ({"warmup_fraction": 0.5}, {"max_steps": 16}),
        ({"warmup_fraction": 1.0}, {"fast_dev_run": 4}),
    ],
    ids=str,
)
def test_requires_steps_where_only_the_module_knows_when_it_steps(tmp_path, warmup, options):
    module = Manual()
    ((name, value),) = warmup.items()
    said = (
        f"LearningRateWarmup({name}={value}) has no length in steps under manual optimization, where only "
        "the module knows how often it steps each optimizer: pass warmup_steps"
    )
    with pytest.raises(MisconfigurationException, match=re.escape(said)):
        walk(tmp_path, module, LearningRateWarmup(**warmup), **options)
    assert module.position() == (1.0, 1.0)


def test_counts_the_steps_of_each_optimizer_where_the_module_steps(tmp_path):
    module = walk(tmp_path, Manual(), LearningRateWarmup(4), max_epochs=2)
    assert module.position() == pytest.approx((1 - RATES[0] * (2.5 + 2), 1 - RATES[1] * (2.5 + 14)))


def second_fit(tmp_path, module, warmup, *callbacks, then, **options):
    """A fit of so many steps or epochs, and one that goes on without a checkpoint."""
    fitting = walker(tmp_path, LearningRateWarmup(**warmup), *callbacks, **options)
    fitting.fit(module)
    if "max_steps" in then:
        fitting.fit_loop.epoch_loop.max_steps = then["max_steps"]
    fitting.fit_loop.max_epochs = then.get("max_epochs", fitting.max_epochs)
    fitting.fit(module)
    return fitting


@pytest.mark.parametrize(
    ("warmup", "options", "then", "length", "steps"),
    [
        ({"warmup_fraction": 0.5}, {}, {"max_epochs": 3}, BATCHES / 2, BATCHES),
        ({"warmup_fraction": 1.0}, {}, {"max_epochs": 6}, 4 * BATCHES, 4 * BATCHES),
        ({"warmup_fraction": 0.5}, {"max_steps": 8}, {"max_steps": 20, "max_epochs": 9}, 6, 12),
        ({"warmup_fraction": 0.5}, {"max_steps": 8}, {"max_steps": 20, "max_epochs": 2}, 6, 12),
        ({"warmup_fraction": 0.5}, {"accumulate_grad_batches": 3}, {"max_epochs": 4}, 4, 8),
        ({"warmup_epochs": 1}, {}, {"max_epochs": 3}, BATCHES, BATCHES),
        ({"warmup_epochs": 0.5}, {}, {"max_epochs": 4}, BATCHES / 2, 2 * BATCHES),
        ({"warmup_steps": BATCHES}, {}, {"max_epochs": 3}, BATCHES, BATCHES),
    ],
    ids=str,
)
def test_a_second_fit_has_the_remaining_length(tmp_path, warmup, options, then, length, steps):
    module = Walk()
    second_fit(tmp_path, module, warmup, then=then, **options)
    assert module.rates() == warmed(length, steps)


@pytest.mark.parametrize(
    ("warmup", "length"), [({"warmup_epochs": 2}, 4 + 12), ({"warmup_fraction": 0.5}, (4 + 12) / 2)]
)
def test_a_second_fit_has_the_accumulation_of_its_epochs(tmp_path, warmup, length):
    module = Walk()
    accumulation = GradientAccumulationScheduler({0: 1, 2: 3, 3: 1})
    second_fit(tmp_path, module, warmup, accumulation, then={"max_epochs": 4})
    assert module.rates() == warmed(length, 4 + 12)


@pytest.mark.parametrize("warmup", [{"warmup_epochs": 2}, {"warmup_steps": 24}])
def test_a_second_fit_that_a_warmup_does_not_fit_is_refused(tmp_path, warmup):
    with pytest.raises(MisconfigurationException, match="would take 24 of the 12 optimizer steps"):
        second_fit(tmp_path, Walk(), warmup, then={"max_epochs": 3})


def test_a_second_fit_where_nothing_is_left_returns(tmp_path):
    module = Walk()
    fitting = second_fit(tmp_path, module, {"warmup_epochs": 1}, then={"max_epochs": 2})
    assert fitting.global_step == 2 * BATCHES


def tensor_rate(groups):
    """SGD with a learning rate in a tensor of its own for each group."""
    groups = [{**group, "lr": torch.tensor(group["lr"], dtype=torch.float64)} for group in groups]
    return torch.optim.SGD(groups)


class Compiled(Walk):
    """Compiles the step of its optimizer."""

    compiled = None

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        if self.compiled is None:
            self.compiled = torch.compile(optimizer.optimizer.step, backend="eager")
        self.compiled()


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [None, partial(lr_scheduler.CosineAnnealingLR, T_max=40)])
@pytest.mark.skipif(
    not has("typing-extensions>=4.12"), reason="torch 2.13 cannot compile with typing-extensions before 4.12"
)
def test_a_compiled_step_uses_the_warmed_up_rates(tmp_path, scheduler):
    torch.compiler.reset()
    module = walk(tmp_path, Compiled(tensor_rate, scheduler), LearningRateWarmup(6), max_epochs=1)
    plain = walk(tmp_path, Walk(tensor_rate, scheduler), max_epochs=1)
    factors = [min(1.0, step / 6) for step in range(1, BATCHES + 1)]
    assert module.rates() == close(scaled(plain.rates(), factors))
    assert module.seen == plain.seen
