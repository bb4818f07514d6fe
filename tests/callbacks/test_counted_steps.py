"""A warmup counts every optimizer step that took place, wherever it was called, and nothing else.

The rows of the table in docs/learning_rate.md.
"""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, LearningRateFinder
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import SGD

from lightning_lars import LAMB, LARS, BatchSizeScaling, LearningRateWarmup
from tests.support.walk import BATCH_SIZE, BATCHES, RATES, Walk, scaled, walk, walker
from tests.support.wrappers import SAM, Bare, HookedLookahead, Lookahead, OwnStep

WARMUP, BASE = 5, 3


def close(rates):
    return [pytest.approx(step, rel=1e-12, abs=1e-14) for step in rates]


def warmed(steps, rates=RATES, first=1):
    """The rates of so many steps of a warmup that scales, too."""
    scale = BATCH_SIZE / BASE
    return close(scaled([rates] * steps, [scale * min(1, t / WARMUP) for t in range(first, first + steps)]))


class Manual(Walk):
    """Notes how far every step moves, wherever it is taken."""

    automatic_optimization = False
    raw = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.moved = []

    def training_step(self, batch, batch_idx):
        self.step()

    def step(self):
        optimizer = self.optimizers(use_pl_optimizer=not self.raw)
        self.update(optimizer)

    def update(self, optimizer):
        optimizer.zero_grad()
        self.manual_backward(self.a + self.b)
        with self.noted():
            optimizer.step()

    def noted(self):
        return Noted(self)


class Noted:
    """Notes how far the weights moved."""

    def __init__(self, module):
        self.module = module

    def __enter__(self):
        self.before = self.module.position()

    def __exit__(self, *_):
        moves = zip(self.before, self.module.position(), strict=True)
        self.module.moved.append(tuple(was - now for was, now in moves))


def train(tmp_path, module, *callbacks, **options):
    return walk(tmp_path, module, LearningRateWarmup(WARMUP), BatchSizeScaling(BASE), *callbacks, **options)


@pytest.mark.parametrize("raw", [False, True])
def test_in_training_step(tmp_path, raw):
    module = Manual()
    module.raw = raw
    assert train(tmp_path, module).moved == warmed(2 * BATCHES)


class OfOptimizer(Manual):
    """Steps what is inside of Lightning's wrapper."""

    def step(self):
        self.update(self.optimizers().optimizer)


class OfTrainer(Manual):
    """Steps what the Trainer holds."""

    def step(self):
        self.update(self.trainer.optimizers[0])


class ByClosure(Manual):
    """Computes the gradient twice in a closure, which sees the plain rates."""

    def step(self):
        optimizer = self.optimizers()

        def closure():
            self.look()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.a + self.b)

        with self.noted():
            optimizer.step(closure)


@pytest.mark.parametrize("module", [OfOptimizer, OfTrainer, ByClosure])
def test_however_the_optimizer_is_reached(tmp_path, module):
    module = train(tmp_path, module())
    assert module.moved == warmed(2 * BATCHES)
    assert set(module.seen) == set(RATES)


class Accumulates(Manual):
    """Leaves the step to a hook."""

    def training_step(self, batch, batch_idx):
        self.manual_backward((self.a + self.b) / BATCHES)

    def step(self):
        with self.noted():
            self.optimizers().step()
        self.optimizers().zero_grad()


class AfterBatch(Accumulates):
    def training_step(self, batch, batch_idx):
        self.manual_backward(self.a + self.b)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.step()
        super().on_train_batch_end(outputs, batch, batch_idx)


class BeforeNextBatch(AfterBatch):
    def on_train_batch_start(self, batch, batch_idx):
        if self.a.grad is not None:
            self.step()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass

    def on_train_end(self):
        self.step()


class AfterEpoch(Accumulates):
    def on_train_epoch_end(self):
        self.step()


class BeforeNextEpoch(Accumulates):
    def on_train_epoch_start(self):
        if self.a.grad is not None:
            self.step()

    def on_train_end(self):
        self.step()


class Steps(Callback):
    """Steps for the module, in a hook of its name."""

    def __init__(self, hook):
        setattr(self, hook, lambda trainer, module, *_: module.step())


@pytest.mark.parametrize(
    ("module", "callbacks", "steps"),
    [
        (AfterBatch, [], 2 * BATCHES),
        (BeforeNextBatch, [], 2 * BATCHES),
        (AfterEpoch, [], 12),
        (BeforeNextEpoch, [], 12),
        (Accumulates, ["on_train_batch_end"], 2 * BATCHES),
        (Accumulates, ["on_train_epoch_end"], 12),
    ],
)
def test_in_another_hook(tmp_path, module, callbacks, steps):
    epochs = 2 if steps > 12 else 12
    module = train(tmp_path, module(), *map(Steps, callbacks), max_epochs=epochs)
    rates = scaled([RATES], [1 / BATCHES])[0] if callbacks == ["on_train_batch_end"] else RATES
    assert module.moved == warmed(steps, rates)


class Saves(Checkpoint):
    """Saves after the third step, which Lightning may not know of."""

    def on_train_batch_end(self, trainer, module, *_):
        self.save(trainer, module)

    on_train_epoch_end = on_train_batch_end

    def save(self, trainer, module):
        path = f"{trainer.default_root_dir}/third.ckpt"
        if len(module.moved) == 3 and not Path(path).exists():
            trainer.save_checkpoint(path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("module", "callbacks", "epochs"),
    [
        (Manual, [], 1),
        (AfterEpoch, [], 8),
        (Accumulates, ["on_train_batch_end"], 1),
        (Accumulates, ["on_train_epoch_end"], 8),
    ],
)
def test_a_resumed_run_continues_with_the_next_step(tmp_path, module, callbacks, epochs):
    build = partial(module, partial(SGD, momentum=0.9))
    straight = train(tmp_path, build(), *map(Steps, callbacks), Saves(), max_epochs=epochs)
    options = {"max_epochs": epochs, "ckpt_path": tmp_path / "third.ckpt"}
    resumed = train(tmp_path, build(), *map(Steps, callbacks), **options)
    assert resumed.moved == straight.moved[3:]
    assert resumed.position() == straight.position()
    assert len(resumed.moved) > WARMUP - 3


class TakesTurns(Manual):
    """Two optimizers: one steps every fourth batch, the other in the rest."""

    def configure_optimizers(self):
        return [SGD([self.a], RATES[0]), SGD([self.b], RATES[1])]

    def training_step(self, batch, batch_idx):
        self.update(self.optimizers()[0 if batch_idx % 4 == 0 else 1])


def test_optimizers_that_take_turns_have_a_count_each(tmp_path):
    module = train(tmp_path, TakesTurns())
    first, second = ([move[i] for move in module.moved if move[i]] for i in range(2))
    assert [(rate, rate) for rate in first] == warmed(6, (RATES[0],) * 2)
    assert [(rate, rate) for rate in second] == warmed(18, (RATES[1],) * 2)


class ZeroesInside(Walk):
    """Zeroes the gradients in a hook of the step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
        return optimizer


class ManuallyZeroesInside(ZeroesInside, Manual):
    pass


def test_gradients_that_are_zeroed_inside_the_step(tmp_path):
    assert train(tmp_path, ZeroesInside()).rates() == warmed(2 * BATCHES)
    assert train(tmp_path, ManuallyZeroesInside()).moved == warmed(2 * BATCHES)


class Halves(Manual):
    """Sharpness-aware minimization in two halves."""

    def __init__(self, zero_grad):
        super().__init__(partial(SAM, base_optimizer=SGD, lr=1.0))
        self.zero_grad_inside = zero_grad

    def step(self):
        optimizer = self.optimizers().optimizer
        optimizer.zero_grad()
        with self.noted():
            self.manual_backward(self.a + self.b)
            optimizer.first_step(zero_grad=True)
            self.manual_backward(self.a + self.b)
            optimizer.second_step(zero_grad=self.zero_grad_inside)


def near(rates):
    """SAM climbs and comes back, which rounds."""
    return [pytest.approx(step.expected, rel=1e-10) for step in rates]


@pytest.mark.parametrize("zero_grad", [False, True])
def test_the_halves_of_sam(tmp_path, zero_grad):
    assert train(tmp_path, Halves(zero_grad)).moved == near(warmed(2 * BATCHES))


def test_sam_by_automatic_optimization(tmp_path):
    module = train(tmp_path, Walk(partial(SAM, base_optimizer=SGD, lr=1.0)))
    assert module.rates() == near(warmed(2 * BATCHES))
    assert set(module.seen) == set(RATES)


@pytest.mark.parametrize("kind", [Lookahead, HookedLookahead])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_wrapped_optimizer(tmp_path, kind, accumulated):
    options = {"accumulate_grad_batches": accumulated}
    module = walk(tmp_path, Walk(lambda groups: kind(SGD(groups))), LearningRateWarmup(WARMUP), **options)
    fast = [min(1, t / WARMUP) for t in range(1, 2 * BATCHES // accumulated + 1)]
    # Every second step goes back half of what two have moved.
    expected = [-(fast[t - 1] - fast[t]) / 2 if t % 2 else fast[t] for t in range(len(fast))]
    moving = [factor for factor in expected if factor]
    assert module.rates() == close(scaled([RATES] * len(moving), moving))
    assert set(module.seen) == set(RATES)


class MovesOn(torch.optim.Optimizer):
    """Moves by its own rate, once more, after the step of the optimizer inside."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 1.0})
        self.inner = SGD(self.param_groups)

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner.step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"]
        return loss


@pytest.mark.parametrize("own_groups", [False, True])
def test_an_optimizer_around_another_keeps_the_rates_to_the_end_of_its_step(tmp_path, own_groups):
    def build(groups):
        optimizer = MovesOn(groups)
        if own_groups:
            optimizer.inner.param_groups = [dict(group) for group in optimizer.param_groups]
        return optimizer

    expected = warmed(2 * BATCHES, scaled([RATES], [2])[0])
    assert train(tmp_path, Walk(build)).rates() == expected


class Checkpointed(Callback):
    """Lets torch.distributed.checkpoint look at the optimizer where it has no gradients."""

    def __init__(self, hook):
        setattr(self, hook, self.look)

    def look(self, trainer, module, *_):
        (optimizer,) = trainer.optimizers
        grads = [p.grad for p in module.parameters()]
        optimizer.zero_grad()
        get_optimizer_state_dict(module, optimizer)
        for p, grad in zip(module.parameters(), grads, strict=True):
            p.grad = grad


@pytest.mark.parametrize("optimizer", [SGD, torch.optim.AdamW, LARS, LAMB])
@pytest.mark.parametrize(
    "hook", ["on_train_start", "on_train_batch_start", "on_before_zero_grad", "on_train_batch_end"]
)
def test_the_trial_steps_of_distributed_checkpoint_consume_no_warmup(tmp_path, optimizer, hook):
    fitting = walker(tmp_path, LearningRateWarmup(WARMUP), BatchSizeScaling(BASE), Checkpointed(hook))
    module = Walk(optimizer)
    fitting.fit(module)
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert state["callbacks"]["LearningRateOwner"] == {"steps": [2 * BATCHES]}
    if optimizer is SGD:
        assert module.rates() == warmed(2 * BATCHES)


class FindsRatesInBetween(LearningRateFinder):
    """Looks for a rate as the second epoch starts, and leaves it at that."""

    def on_fit_start(self, *_):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_the_steps_of_a_search_in_the_middle_consume_no_warmup_and_have_its_rates(tmp_path):
    finder = FindsRatesInBetween(num_training_steps=8, update_attr=False, early_stop_threshold=None)
    module = walk(tmp_path, Walk(), LearningRateWarmup(3 * BATCHES), finder, max_epochs=3)
    # The search calls on_train_start, too: the path begins with it, and jumps back as it ends.
    tried = finder.optimal_lr.results["lr"]
    assert module.rates()[:8] == [pytest.approx((rate, rate)) for rate in tried]
    factors = [step / (3 * BATCHES) for step in range(BATCHES + 2, 3 * BATCHES + 1)]
    assert module.rates()[9:] == close(scaled([RATES] * len(factors), factors))


class SetsUpAnew(Walk):
    """Has Lightning build its optimizer anew as the second epoch starts."""

    def on_train_epoch_start(self):
        if self.trainer.current_epoch == 1:
            self.trainer.strategy.setup_optimizers(self.trainer)


def test_an_optimizer_that_is_set_up_in_the_middle_warms_up(tmp_path):
    module = train(tmp_path, SetsUpAnew())
    assert module.rates() == [*warmed(BATCHES), *warmed(BATCHES)]


class GrowsAnother(TakesTurns):
    """Gets its second optimizer in the second epoch."""

    def configure_optimizers(self):
        return super().configure_optimizers()[:1]

    def on_train_epoch_start(self):
        if self.trainer.current_epoch == 1:
            self.trainer.optimizers = [*self.trainer.optimizers, SGD([self.b], RATES[1])]

    def training_step(self, batch, batch_idx):
        for optimizer in self.trainer.optimizers:
            self.update(optimizer)


def test_an_optimizer_that_joins_in_the_middle_warms_up_and_the_other_continues(tmp_path):
    module = train(tmp_path, GrowsAnother())
    first, second = ([move[i] for move in module.moved if move[i]] for i in range(2))
    assert [(rate, rate) for rate in first] == warmed(2 * BATCHES, (RATES[0],) * 2)
    assert [(rate, rate) for rate in second] == warmed(BATCHES, (RATES[1],) * 2)


class Never(Manual):
    """Has a second optimizer that it never steps."""

    def configure_optimizers(self):
        return [SGD([self.a], RATES[0]), SGD([self.b], RATES[1])]

    def step(self):
        self.update(self.optimizers()[0])


NEVER = "had no effect on {}, which took no step that counts: optimizer.step(), during fit, with a gradient"


def test_an_optimizer_that_took_no_step_is_named(tmp_path):
    with pytest.warns(UserWarning, match=re.escape(f"warmup of the learning rate {NEVER.format('SGD-1')}")):
        walk(tmp_path, Never(), LearningRateWarmup(WARMUP))


def test_all_that_had_no_effect_is_named(tmp_path):
    class Descends(Manual):
        """Moves its weights itself."""

        def step(self):
            with torch.no_grad():
                self.a -= 0.1

    said = f"batch-size scaling, warmup of the learning rate {NEVER.format('SGD')}"
    with pytest.warns(UserWarning, match=re.escape(said)):
        train(tmp_path, Descends())


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"max_steps": 0}, {"max_epochs": 0}])
def test_a_run_without_batches_says_nothing(tmp_path, options):
    train(tmp_path, Manual(), **options)


@pytest.mark.parametrize("kind", [Bare, OwnStep])
def test_an_optimizer_whose_steps_cannot_be_observed_is_refused_before_training(tmp_path, kind):
    module = Walk(lambda groups: kind([p for group in groups for p in group["params"]]))
    said = f"got a {kind.__name__}, whose steps cannot be observed: put the factor into the schedule"
    with pytest.raises(MisconfigurationException, match=re.escape(said)):
        train(tmp_path, module)
    assert module.position() == (1.0, 1.0)


def test_a_refusal_leaves_the_optimizers_unchanged(tmp_path):
    class Second(Never):
        """Has one optimizer whose steps can be seen, and one of which they cannot."""

        def configure_optimizers(self):
            self.first = SGD([self.a], RATES[0])
            return [self.first, Bare([self.b])]

    module = Second()
    with pytest.raises(MisconfigurationException, match="got a Bare, whose steps cannot be observed"):
        train(tmp_path, module)
    assert not module.first._optimizer_step_pre_hooks
    assert not module.first._optimizer_state_dict_pre_hooks


class Relative(SGD):
    """Finds its own rate, as Adafactor does."""

    def __init__(self, params):
        super().__init__(params)
        for group in self.param_groups:
            group["lr"] = None


class Rateless(SGD):
    """Has no rate at all in its second group."""

    def __init__(self, params):
        super().__init__(params)
        del self.param_groups[1]["lr"]


@pytest.mark.parametrize("kind", [Relative, Rateless])
@pytest.mark.parametrize("callback", [LearningRateWarmup(WARMUP), BatchSizeScaling(BASE)])
def test_an_optimizer_without_a_rate_is_refused_before_training(tmp_path, kind, callback):
    module = Walk(kind)
    module.look = lambda: None
    said = "need a number or a tensor as the lr of every parameter group, got None from " + kind.__name__
    with pytest.raises(MisconfigurationException, match=re.escape(said)):
        walk(tmp_path, module, callback)
    assert module.position() == (1.0, 1.0)


class Catches(Manual):
    """Lets one step fail, and goes on."""

    def step(self):
        optimizer = self.optimizers().optimizer
        if self.trainer.global_step == 0 and self.trainer.fit_loop.total_batch_idx == 2:

            def fail(*_):
                raise RuntimeError("broken off")

            handle = optimizer.register_step_pre_hook(fail)
            with pytest.raises(RuntimeError, match="broken off"):
                self.update(optimizer)
            handle.remove()
        else:
            self.update(optimizer)


def test_a_step_that_failed_consumes_no_warmup_and_leaves_the_plain_rates(tmp_path):
    module = train(tmp_path, Catches())
    del module.moved[2]
    assert module.moved == warmed(2 * BATCHES - 1)
    assert set(module.seen) == set(RATES)
