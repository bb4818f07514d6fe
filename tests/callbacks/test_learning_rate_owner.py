"""The rate inside a step is the scheduled rate times the factors; elsewhere it is the scheduled rate."""

from functools import partial

import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import lr_scheduler

from lightning_lars import LAMB, LARS, BatchSizeScaling, LearningRateWarmup
from tests.support.boring import Boring, trainer
from tests.support.releases import has
from tests.support.walk import BATCH_SIZE, BATCHES, RATES, OtherWalk, Walk, scaled, walk, walker

EPOCHS, WARMUP, BASE = 2, 5, 3


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)


def sequential(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 3), lr_scheduler.CosineAnnealingLR(optimizer, 40)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


def chained(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


SCHEDULERS = {
    "none": None,
    "cosine": cosine,
    "restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    "milestones": partial(lr_scheduler.MultiStepLR, milestones=[1, 3, 9], gamma=0.5),
    "exponential": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "steps": partial(lr_scheduler.StepLR, step_size=2, gamma=0.7),
    "multiplicative": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 1 - 0.5 / (step + 1)),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=[0.02, 0.03], total_steps=25, cycle_momentum=False),
    "cyclic": partial(
        lr_scheduler.CyclicLR, base_lr=[0.01, 0.02], max_lr=0.05, step_size_up=3, cycle_momentum=False
    ),
    "sequential": sequential,
    "chained": chained,
    "plateau": partial(lr_scheduler.ReduceLROnPlateau, patience=1, factor=0.8),
}


def tensor_rate(groups):
    """SGD with a learning rate in a tensor of its own for each group."""
    groups = [{**group, "lr": torch.tensor(group["lr"], dtype=torch.float64)} for group in groups]
    return torch.optim.SGD(groups)


def shared_tensor_rate(groups):
    """SGD with one tensor as the learning rate of both groups."""
    rate = torch.tensor(RATES[0], dtype=torch.float64)
    return torch.optim.SGD([{**group, "lr": rate} for group in groups], lr=rate)


OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "SGD with tensors": tensor_rate,
    "SGD with a shared tensor": shared_tensor_rate,
    "AdamW": partial(torch.optim.AdamW, eps=0.0, weight_decay=0.0),
    "LARS": partial(LARS, momentum=0.0, trust_coefficient=1.0, eps=0.0),
    "LAMB": partial(LAMB, eps=0.0, weight_decay=0.0),
}
ADAPTED = ("LARS", "LAMB")


def both():
    """A warmup and a scaling."""
    return LearningRateWarmup(WARMUP), BatchSizeScaling(BASE)


def factors(steps, accumulated=1, first=1):
    """What both make of the rates of as many steps."""
    scale = BATCH_SIZE * accumulated / BASE
    return [scale * min(1.0, step / WARMUP) for step in range(first, first + steps)]


def close(rates):
    return [pytest.approx(step, rel=1e-12, abs=1e-14) for step in rates]


def fit(tmp_path, module, *callbacks, **options):
    """The module after a training with the callbacks, and a twin after one without them."""
    options = {"max_epochs": EPOCHS, **options}
    twin = type(module)(module.optimizer, module.scheduler, module.interval)
    return walk(tmp_path, module, *callbacks, **options), walk(tmp_path, twin, **options)


@pytest.mark.parametrize("accumulated", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_step_uses_the_schedule_times_both_factors(tmp_path, scheduler, accumulated):
    module, plain = fit(
        tmp_path, Walk(scheduler=SCHEDULERS[scheduler]), *both(), accumulate_grad_batches=accumulated
    )
    steps = EPOCHS * BATCHES // accumulated
    assert module.rates() == close(scaled(plain.rates(), factors(steps, accumulated)))
    assert module.seen == plain.seen


@pytest.mark.parametrize("scheduler", ["cosine", "multiplicative", "plateau"])
def test_a_schedule_of_epochs_is_kept(tmp_path, scheduler):
    module, plain = fit(
        tmp_path, Walk(scheduler=SCHEDULERS[scheduler], interval="epoch"), *both(), max_epochs=4
    )
    assert module.rates() == close(scaled(plain.rates(), factors(4 * BATCHES)))
    assert module.seen == plain.seen
    assert len(set(plain.seen)) > 2


@pytest.mark.parametrize("accumulated", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_steps_with_the_schedule_times_both_factors(tmp_path, optimizer, accumulated):
    module, plain = fit(
        tmp_path,
        Walk(OPTIMIZERS[optimizer], scheduler=cosine),
        *both(),
        accumulate_grad_batches=accumulated,
    )
    adapted = optimizer in ADAPTED
    steps = EPOCHS * BATCHES // accumulated
    assert module.rates(adapted) == close(scaled(plain.rates(adapted), factors(steps, accumulated)))
    assert module.seen == plain.seen


@pytest.mark.parametrize("optimizer", [tensor_rate, shared_tensor_rate])
def test_a_tensor_stays_the_learning_rate_of_its_groups(tmp_path, optimizer):
    built = []
    module = Walk(lambda groups: built.append(optimizer(groups)) or built[0])
    fitting = walker(tmp_path, *both())
    before = []
    module.on_fit_start = lambda: before.extend(group["lr"] for group in built[0].param_groups)
    fitting.fit(module)
    assert [id(group["lr"]) for group in built[0].param_groups] == [id(rate) for rate in before]


@pytest.mark.parametrize("order", ["warmup first", "scaling first"])
def test_the_order_of_the_callbacks_does_not_matter(tmp_path, order):
    callbacks = both() if order == "warmup first" else both()[::-1]
    module, plain = fit(tmp_path, Walk(scheduler=cosine), *callbacks)
    assert module.rates() == close(scaled(plain.rates(), factors(EPOCHS * BATCHES)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_checkpoint_holds_the_plain_rates(tmp_path, optimizer):
    def every_step(where):
        return ModelCheckpoint(
            tmp_path / where, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
        )

    module, plain = (Walk(OPTIMIZERS[optimizer], scheduler=cosine) for _ in range(2))
    walk(tmp_path, module, *both(), every_step("ours"))
    walk(tmp_path, plain, every_step("plain"))
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert len(names) == EPOCHS * BATCHES
    for name in names:
        assert _learning_rates(tmp_path / "ours" / name) == _learning_rates(tmp_path / "plain" / name)


def test_a_checkpoint_written_after_fit_holds_the_plain_rates_and_the_count(tmp_path):
    fitting = walker(tmp_path, *both())
    fitting.fit(Walk())
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    assert _learning_rates(tmp_path / "after.ckpt")[0] == list(RATES)
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert state["callbacks"]["LearningRateOwner"] == {"steps": [EPOCHS * BATCHES]}


class SavesInStep(Walk):
    """Writes a checkpoint from within a step, where the rates are adjusted."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/inside.ckpt")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_written_inside_a_step_is_plain_and_leaves_the_step_adjusted(tmp_path, optimizer):
    module = walk(tmp_path, SavesInStep(OPTIMIZERS[optimizer]), *both())
    plain = walk(tmp_path / "plain", Walk(OPTIMIZERS[optimizer]))
    adapted = optimizer in ADAPTED
    assert module.rates(adapted) == close(scaled(plain.rates(adapted), factors(EPOCHS * BATCHES)))
    assert _learning_rates(tmp_path / "inside.ckpt")[0] == plain.seen[:2]


def test_a_checkpoint_written_inside_a_step_counts_the_steps_before_it(tmp_path):
    walk(tmp_path, SavesInStep(), *both())
    state = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    assert state["callbacks"]["LearningRateOwner"] == {"steps": [3]}


class SavesAfterStep(Walk):
    """Writes a checkpoint right after its third step, in the same batch."""

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.trainer.global_step == 2:
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/after.ckpt")


def test_a_checkpoint_written_right_after_a_step_counts_that_step(tmp_path):
    walk(tmp_path, SavesAfterStep(), *both())
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert state["callbacks"]["LearningRateOwner"] == {"steps": [3]}


def _learning_rates(path):
    checkpoint = torch.load(path, weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    return [float(group["lr"]) for group in groups], checkpoint["lr_schedulers"]


class Overflows(Walk):
    """Has infinite gradients on some batches."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if batch_idx in (1, 2, 5) else loss


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_consume_no_warmup(tmp_path, fused):
    def precision():
        return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))

    optimizer = partial(torch.optim.SGD, fused=fused)
    module = walk(tmp_path, Overflows(optimizer, cosine), *both(), plugins=[precision()])
    plain = walk(tmp_path, Overflows(optimizer, cosine), plugins=[precision()])
    happened = EPOCHS * (BATCHES - 3)
    assert module.rates() == close(scaled(plain.rates(), factors(happened)))
    assert module.seen == plain.seen


class Skips(Walk):
    """Has no loss on some batches."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (1, 2, 5) else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_without_a_loss_consume_no_warmup(tmp_path):
    module, plain = fit(tmp_path, Skips(scheduler=cosine), *both())
    assert module.rates() == close(scaled(plain.rates(), factors(EPOCHS * (BATCHES - 3))))
    assert module.seen == plain.seen


class LeavesEpochs(Walk):
    """Leaves every epoch after three batches."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        return -1 if batch_idx == 3 else None


def test_an_epoch_that_is_left_early_consumes_no_warmup(tmp_path):
    module, plain = fit(tmp_path, LeavesEpochs(scheduler=cosine), *both())
    assert module.rates() == close(scaled(plain.rates(), factors(EPOCHS * 3)))
    assert module.seen == plain.seen


class StepsByGroup(Walk):
    """Steps the groups one by one, as DeepSpeed does with the optimizer that it wraps."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        optimizer = optimizer.optimizer
        groups = optimizer.param_groups
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups


def test_groups_that_step_one_by_one_take_one_step(tmp_path):
    module, plain = fit(tmp_path, StepsByGroup(scheduler=cosine), *both())
    assert module.rates() == close(scaled(plain.rates(), factors(EPOCHS * BATCHES)))
    assert module.seen == plain.seen


class Manual(Walk):
    """Two optimizers of their own pace: one steps twice every third batch, the other every second batch."""

    def __init__(self, *_):
        super().__init__()
        self.automatic_optimization = False
        self.steps = ([], [])

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD([self.a], RATES[0]), torch.optim.SGD([self.b], RATES[1])]
        return optimizers, [cosine(optimizer) for optimizer in optimizers]

    def training_step(self, batch, batch_idx):
        for times, index in ((2 if batch_idx % 3 == 0 else 1, 0), (1 - batch_idx % 2, 1)):
            for _ in range(times):
                optimizer, before = self.optimizers()[index], self.position()[index]
                optimizer.zero_grad()
                self.manual_backward(self.a + self.b)
                optimizer.step()
                self.steps[index].append(before - self.position()[index])
        for scheduler in self.lr_schedulers():
            scheduler.step()


@pytest.mark.parametrize("index", [0, 1])
def test_every_optimizer_counts_its_own_steps_in_manual_optimization(tmp_path, index):
    module, plain = fit(tmp_path, Manual(), *both())
    expected = [
        rate * f for rate, f in zip(plain.steps[index], factors(len(plain.steps[index])), strict=True)
    ]
    assert module.steps[index] == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert len(expected) == EPOCHS * (16, 6)[index]
    assert module.seen == plain.seen


def test_a_warmup_longer_than_the_batches_is_fine_in_manual_optimization(tmp_path):
    module, plain = fit(tmp_path, Manual(), LearningRateWarmup(30))
    expected = [rate * step / 30 for step, rate in enumerate(plain.steps[0], start=1)]
    assert module.steps[0][:30] == pytest.approx(expected[:30], rel=1e-12, abs=1e-14)


def test_overfit_batches_changes_nothing(tmp_path):
    module, plain = fit(tmp_path, Walk(scheduler=cosine), *both(), overfit_batches=3)
    assert module.rates() == close(scaled(plain.rates(), factors(EPOCHS * 3)))
    assert module.seen == plain.seen


def test_fast_dev_run_tries_the_start_of_a_warmup_of_any_length(tmp_path):
    module, plain = fit(tmp_path, Walk(), LearningRateWarmup(100), fast_dev_run=3)
    assert module.rates() == close(scaled(plain.rates(), [0.01, 0.02, 0.03]))


def test_a_second_fit_warms_its_new_optimizer_up_again(tmp_path):
    module, fitting = Walk(), walker(tmp_path, *both())
    fitting.fit(module)
    fitting.fit_loop.max_epochs = 2 * EPOCHS
    fitting.fit(module)
    assert module.rates() == close(scaled([RATES] * EPOCHS * BATCHES, factors(EPOCHS * BATCHES)))


class Fails(Walk):
    """Breaks off once, inside a step."""

    failed = False

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 3 and not self.failed:
            self.failed = True
            raise RuntimeError("broken off")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_exception_inside_a_step_leaves_the_plain_rates(tmp_path, optimizer):
    module = Fails(OPTIMIZERS[optimizer])
    fitting = walker(tmp_path, *both())
    with pytest.raises(RuntimeError, match="broken off"):
        fitting.fit(module)
    assert [float(group["lr"]) for group in fitting.optimizers[0].param_groups] == module.seen[:2]


def test_an_optimizer_that_outlives_an_exception_steps_with_its_own_rate(tmp_path):
    module = Fails()
    fitting = walker(tmp_path, *both())
    with pytest.raises(RuntimeError, match="broken off"):
        fitting.fit(module)
    before = module.position()
    fitting.optimizers[0].step()
    moved = [was - now for was, now in zip(before, module.position(), strict=True)]
    assert moved == pytest.approx(RATES, rel=1e-12, abs=1e-14)


def test_an_optimizer_that_outlives_the_run_steps_with_its_own_rate(tmp_path):
    fitting = walker(tmp_path, LearningRateWarmup(100), max_steps=50, max_epochs=-1, fast_dev_run=True)
    module = Walk()
    fitting.fit(module)
    before = module.position()
    fitting.optimizers[0].step()
    moved = [was - now for was, now in zip(before, module.position(), strict=True)]
    assert moved == pytest.approx(RATES, rel=1e-12, abs=1e-14)


def test_a_fit_after_an_exception_starts_from_the_first_step(tmp_path):
    module, fitting = Fails(), walker(tmp_path, *both())
    with pytest.raises(RuntimeError, match="broken off"):
        fitting.fit(module)
    fitting.fit(module)
    steps = len(module.rates())
    assert steps > WARMUP
    assert module.rates() == close(scaled([RATES] * steps, factors(steps)))


def test_the_rates_follow_the_batch_size_that_the_finder_found(tmp_path):
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=1)
    module = walk(tmp_path, Walk(), BatchSizeScaling(BASE), finder)
    assert module.batch_size > BATCH_SIZE
    steps = EPOCHS * BATCHES * BATCH_SIZE // module.batch_size
    assert module.rates() == close(scaled([RATES] * steps, [module.batch_size / BASE] * steps))


class Tunable(Walk):
    """Has the attribute that a LearningRateFinder writes to."""

    lr = 0.1


@pytest.mark.skipif(
    not has("lightning>=2.6"), reason="Lightning before 2.6 trains on with the rate from before the search"
)
def test_a_warmup_leads_to_the_rate_that_the_finder_found(tmp_path):
    finders = [LearningRateFinder(num_training_steps=20) for _ in range(2)]
    module = walk(tmp_path, Tunable(), LearningRateWarmup(WARMUP), finders[0])
    plain = walk(tmp_path, Tunable(), finders[1])
    assert module.lr == plain.lr == finders[0].optimal_lr.suggestion()
    warmed = [min(1.0, step / WARMUP) for step in range(1, EPOCHS * BATCHES + 1)]
    assert module.rates() == close(scaled([(module.lr, module.lr)] * len(warmed), warmed))


@pytest.mark.parametrize("scheduler", ["none", "cosine"])
def test_the_other_package_trains_with_the_same_rates(tmp_path, scheduler):
    module = walk(tmp_path, Walk(scheduler=SCHEDULERS[scheduler]), *both())
    other = OtherWalk(scheduler=SCHEDULERS[scheduler])
    walk(tmp_path, other, *both(), root=pytorch_lightning)
    assert other.path == module.path
    assert other.seen == module.seen


@pytest.mark.parametrize("lr", [1.0, "tensor"])
def test_values_written_in_training_step_change_the_schedule_and_are_kept(tmp_path, lr):
    """Lightning runs training_step inside of the step, as its closure."""

    class Halving(Boring):
        def __init__(self):
            super().__init__(optimizer=partial(LARS, lr=torch.tensor(1.0) if lr == "tensor" else lr))
            self.seen = []

        def training_step(self, batch, batch_idx):
            for group in self.optimizers().optimizer.param_groups:
                group["lr"] *= 0.5
                self.seen.append(float(group["lr"]))
            return super().training_step(batch, batch_idx)

    module = Halving()
    trainer(tmp_path, max_steps=4, callbacks=[LearningRateWarmup(warmup_steps=4)]).fit(module)
    assert module.seen[::2] == module.seen[1::2] == [0.5, 0.25, 0.125, 0.0625]
    assert [float(group["lr"]) for group in module.trainer.optimizers[0].param_groups] == [0.0625] * 2


def test_a_module_without_an_optimizer_says_so(tmp_path):
    class Without(Boring):
        def configure_optimizers(self):
            return None

    with (
        pytest.warns(UserWarning, match="this fit will run with no optimizer"),
        pytest.raises(MisconfigurationException, match="configure_optimizers returned none: remove"),
    ):
        trainer(tmp_path, callbacks=[LearningRateWarmup(4)]).fit(Without())
