"""A resumed run takes the same steps as an uninterrupted one."""

from functools import partial

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.optim import lr_scheduler

from lightning_lars import LAMB, LARS, BatchSizeScaling, LearningRateWarmup
from tests.support.slow import slow_unless
from tests.support.walk import BATCH_SIZE, BATCHES, OtherWalk, Walk, scaled, walk, walker

pytestmark = [
    # Lightning's own, about what the tests do on purpose.
    pytest.mark.filterwarnings("ignore:.*fit\\(ckpt_path="),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

WARMUP, BASE = 16, 3
STEPS = 2 * BATCHES


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)


def tensor_rate(groups):
    """SGD with momentum and a learning rate in a tensor of its own for each group."""
    groups = [{**group, "lr": torch.tensor(group["lr"], dtype=torch.float64)} for group in groups]
    return torch.optim.SGD(groups, momentum=0.9)


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "SGD with tensors": tensor_rate,
    "AdamW": torch.optim.AdamW,
    "LARS": partial(LARS, trust_coefficient=1.0),
    "LAMB": LAMB,
}


def both():
    """A warmup that outlasts the first epoch, and a scaling."""
    return LearningRateWarmup(WARMUP), BatchSizeScaling(BASE)


def every_step(tmp_path, package=lightning.pytorch):
    """Keeps a checkpoint of every step, and no other."""
    return package.callbacks.ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )


def every_epoch(tmp_path):
    """Keeps a checkpoint of the end of every epoch."""
    return ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)


@pytest.mark.parametrize(
    ("optimizer", "step"),
    [
        # What a step is to the callbacks, it is with each optimizer.
        slow_unless(optimizer == "LARS" or step == 5, optimizer, step)
        for optimizer in OPTIMIZERS
        for step in (1, 5, 12, 17)
    ],
)
def test_continues_from_every_step(tmp_path, optimizer, step):
    build = partial(Walk, OPTIMIZERS[optimizer], cosine)
    straight = walk(tmp_path, build(), *both(), every_step(tmp_path))
    resumed = walk(
        tmp_path,
        build(),
        *both(),
        every_step(tmp_path / "resumed"),
        ckpt_path=tmp_path / f"step={step}.ckpt",
    )
    assert resumed.moves() == straight.moves()[step:]
    assert resumed.path == straight.path[step:]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_continues_from_the_end_of_an_epoch(tmp_path, interval):
    build = partial(Walk, scheduler=cosine, interval=interval)
    straight = walk(tmp_path, build(), *both(), every_epoch(tmp_path))
    resumed = walk(
        tmp_path,
        build(),
        *both(),
        every_epoch(tmp_path / "resumed"),
        ckpt_path=tmp_path / "epoch=0.ckpt",
    )
    assert resumed.path == straight.path[BATCHES:]


@pytest.mark.parametrize("accumulated", [2, 3])
def test_continues_with_accumulated_batches(tmp_path, accumulated):
    def run(where, **options):
        return walk(
            tmp_path,
            Walk(scheduler=cosine),
            LearningRateWarmup(6),
            BatchSizeScaling(BASE),
            every_step(where),
            accumulate_grad_batches=accumulated,
            **options,
        )

    straight = run(tmp_path)
    resumed = run(tmp_path / "resumed", ckpt_path=tmp_path / "step=3.ckpt")
    assert resumed.path == straight.path[3 * accumulated :]


class Fails(Walk):
    """Breaks off after seven steps, inside the eighth."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 7:
            raise RuntimeError("broken off")
        return super().training_step(batch, batch_idx)


class FailsBetweenSteps(Walk):
    """Breaks off after seven steps, before Lightning has finished the batch of the seventh."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.trainer.global_step == 7:
            raise RuntimeError("broken off")


class Interrupted(Walk):
    """Breaks off right after the seventh step, in the same batch."""

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.trainer.global_step == 6:
            raise RuntimeError("broken off")


@pytest.mark.parametrize("module", [Fails, FailsBetweenSteps, Interrupted])
@pytest.mark.parametrize("optimizer", ["SGD", "SGD with tensors", "LARS"])
def test_the_checkpoint_after_an_exception_holds_the_steps_that_happened(tmp_path, optimizer, module):
    with pytest.raises(RuntimeError, match="broken off"):
        walk(tmp_path, module(OPTIMIZERS[optimizer]), *both(), OnExceptionCheckpoint(tmp_path))
    checkpoint = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["LearningRateOwner"] == {"steps": [7]}
    rates = [float(group["lr"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]
    assert rates == walk(tmp_path, Walk(OPTIMIZERS[optimizer]), max_epochs=1).seen[:2]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_continues_after_an_exception(tmp_path, optimizer):
    build = OPTIMIZERS[optimizer]
    straight = walk(tmp_path, Walk(build, cosine), *both())
    with pytest.raises(RuntimeError, match="broken off"):
        walk(tmp_path, Fails(build, cosine), *both(), OnExceptionCheckpoint(tmp_path))
    resumed = walk(
        tmp_path,
        Walk(build, cosine),
        *both(),
        OnExceptionCheckpoint(tmp_path / "resumed"),
        ckpt_path=tmp_path / "on_exception.ckpt",
    )
    assert resumed.path == straight.path[7:]


class SavesInStep(Walk):
    """Writes a checkpoint from within its sixth step."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 5:
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/inside.ckpt")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_continues_from_a_checkpoint_written_inside_a_step(tmp_path, optimizer):
    build = OPTIMIZERS[optimizer]
    straight = walk(tmp_path, SavesInStep(build, cosine), *both())
    resumed = walk(tmp_path, Walk(build, cosine), *both(), ckpt_path=tmp_path / "inside.ckpt")
    assert resumed.path == straight.path[5:]


def test_a_checkpoint_from_before_the_callbacks_counts_by_its_own_steps(tmp_path):
    plain = walk(tmp_path, Walk(scheduler=cosine), every_step(tmp_path))
    resumed = walk(
        tmp_path,
        Walk(scheduler=cosine),
        *both(),
        every_step(tmp_path / "resumed"),
        ckpt_path=tmp_path / "step=5.ckpt",
    )
    scale = BATCH_SIZE / BASE
    factors = [scale * min(1.0, step / WARMUP) for step in range(6, STEPS + 1)]
    expected = scaled(plain.rates()[5:], factors)
    assert resumed.rates() == [pytest.approx(step, rel=1e-12, abs=1e-14) for step in expected]


def test_a_checkpoint_continues_without_the_callbacks_at_the_plain_rates(tmp_path):
    walk(tmp_path, Walk(scheduler=cosine), *both(), every_step(tmp_path))
    plain = walk(tmp_path, Walk(scheduler=cosine))
    fitting = walker(tmp_path, every_step(tmp_path / "resumed"))
    resumed = Walk(scheduler=cosine)
    with pytest.warns(UserWarning, match="LearningRateOwner"):
        fitting.fit(resumed, ckpt_path=tmp_path / "step=5.ckpt")
    expected = plain.rates()[5:]
    assert resumed.rates() == [pytest.approx(step, rel=1e-12, abs=1e-14) for step in expected]


@pytest.mark.parametrize("accumulated", [2, 3])
def test_another_accumulation_rescales_and_keeps_the_count(tmp_path, accumulated):
    walk(tmp_path, Walk(), *both(), every_epoch(tmp_path))
    plain = walk(tmp_path, Walk(), max_epochs=1, accumulate_grad_batches=accumulated)
    resumed = walk(
        tmp_path,
        Walk(),
        *both(),
        every_epoch(tmp_path / "resumed"),
        accumulate_grad_batches=accumulated,
        max_epochs=4,
        ckpt_path=tmp_path / "epoch=0.ckpt",
    )
    scale = BATCH_SIZE * accumulated / BASE
    steps = 3 * BATCHES // accumulated
    factors = [scale * min(1.0, step / WARMUP) for step in range(BATCHES + 1, BATCHES + steps + 1)]
    expected = scaled(plain.rates()[:1] * steps, factors)
    assert resumed.rates() == [pytest.approx(step, rel=1e-12, abs=1e-14) for step in expected]


def test_a_second_fit_from_a_checkpoint_continues_where_it_was_written(tmp_path):
    straight, fitting = Walk(), walker(tmp_path, *both(), every_step(tmp_path))
    fitting.fit(straight)
    resumed = Walk()
    fitting.fit(resumed, ckpt_path=tmp_path / "step=5.ckpt")
    assert resumed.path == straight.path[5:]


@pytest.mark.parametrize(
    ("warmup", "step"),
    [({"warmup_fraction": 0.5}, 31), ({"warmup_epochs": 1.5}, 25), ({"warmup_steps": 20}, 40)],
)
def test_a_second_fit_continues_from_each_of_its_steps(tmp_path, warmup, step):
    """Its lengths are those of the second fit, also in another Trainer."""
    build = partial(Walk, OPTIMIZERS["SGD"], cosine)

    def trainer_of(folder):
        callbacks = LearningRateWarmup(**warmup), BatchSizeScaling(BASE), every_step(tmp_path / folder)
        return walker(tmp_path, *callbacks)

    straight, fitting = build(), trainer_of("straight")
    fitting.fit(straight)
    fitting.fit_loop.max_epochs = 4
    fitting.fit(straight)
    resumed, fitting = build(), trainer_of("resumed")
    fitting.fit_loop.max_epochs = 4
    fitting.fit(resumed, ckpt_path=tmp_path / f"straight/step={step}.ckpt")
    assert resumed.path == straight.path[step - STEPS :]


def test_the_other_package_continues_from_the_same_checkpoint(tmp_path):
    straight = walk(tmp_path, Walk(scheduler=cosine), *both(), every_step(tmp_path))
    resumed = walk(
        tmp_path,
        OtherWalk(scheduler=cosine),
        *both(),
        every_step(tmp_path / "resumed", pytorch_lightning),
        root=pytorch_lightning,
        ckpt_path=tmp_path / "step=5.ckpt",
    )
    assert resumed.path == straight.path[5:]
