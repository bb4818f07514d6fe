"""Warmup with optimizers of other packages, which wrap another one or set their own rate."""

import re
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_lars import LARS, BatchSizeScaling, LearningRateWarmup, WarmupDecayLR
from tests.support.peers import peer
from tests.support.walk import BATCH_SIZE, BATCHES, RATES, Walk, scaled, walk

PYTORCH_OPTIMIZER = "pytorch_optimizer==4.1.0"
TIMM = "timm==1.0.31"
TORCH_OPTIMIZER = "torch_optimizer==0.3.0"
LOOKAHEADS = {
    "pytorch_optimizer": (PYTORCH_OPTIMIZER, "pytorch_optimizer.optimizer.lookahead"),
    "timm": (TIMM, "timm.optim.lookahead"),
    "torch_optimizer": (TORCH_OPTIMIZER, "torch_optimizer.lookahead"),
}
WARMUP, BASE, NEVER = 5, 3, 1000


def close(rates):
    return [pytest.approx(step, rel=1e-10) for step in rates]


def warmed(steps):
    return close(
        scaled([RATES] * steps, [BATCH_SIZE / BASE * min(1, t / WARMUP) for t in range(1, steps + 1)])
    )


def train(tmp_path, module):
    return walk(tmp_path, module, LearningRateWarmup(WARMUP), BatchSizeScaling(BASE))


@pytest.mark.parametrize("package", LOOKAHEADS)
@pytest.mark.parametrize("base", [SGD, partial(LARS, momentum=0.0, trust_coefficient=1.0, eps=0.0)])
def test_lookahead_warms_up_the_inner_optimizer(tmp_path, package, base):
    lookahead = peer(*LOOKAHEADS[package]).Lookahead
    # Averages so far apart that only the steps inside are seen; some take the first at once.
    module = train(tmp_path, Walk(lambda groups: lookahead(base(groups), k=NEVER)))
    rates = module.rates(adapted=base is not SGD)
    assert rates[1:] == warmed(2 * BATCHES)[1:]
    assert set(module.seen) == set(RATES)


@pytest.mark.parametrize("package", LOOKAHEADS)
def test_lookahead_follows_a_schedule(tmp_path, package):
    lookahead = peer(*LOOKAHEADS[package]).Lookahead
    for schedule in (
        partial(CosineAnnealingLR, T_max=40),
        partial(WarmupDecayLR, warmup_steps=6, total_steps=24),
    ):
        module = train(tmp_path, Walk(lambda groups: lookahead(SGD(groups), k=NEVER), schedule))
        plain = walk(tmp_path, Walk(SGD, schedule))
        factors = [BATCH_SIZE / BASE * min(1, t / WARMUP) for t in range(1, 2 * BATCHES + 1)]
        assert module.rates()[1:] == close(scaled(plain.rates(), factors))[1:]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("package", ["pytorch_optimizer", "timm"])
def test_lookahead_resumes_like_an_uninterrupted_run(tmp_path, package):
    lookahead = peer(*LOOKAHEADS[package]).Lookahead

    def run(**options):
        every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        module = Walk(lambda groups: lookahead(SGD(groups, momentum=0.9), k=2))
        callbacks = LearningRateWarmup(16), BatchSizeScaling(BASE), every_step
        return walk(tmp_path, module, *callbacks, **options)

    straight = run()
    assert run(ckpt_path=tmp_path / "step=5.ckpt").path == straight.path[5:]


@pytest.mark.parametrize("name", ["SAM", "LookSAM", "FriendlySAM"])
def test_sharpness_aware_minimizers_warm_up_the_inner_optimizer(tmp_path, name):
    sam = getattr(peer(PYTORCH_OPTIMIZER, "pytorch_optimizer.optimizer.sam"), name)

    class Closed(Walk):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)

            def closure():
                optimizer.zero_grad()
                loss = self.a + self.b
                loss.backward()
                return loss

            closure()
            optimizer.step(closure)

    module = Closed()
    module.optimizer = lambda groups: sam(groups, base_optimizer=SGD, lr=1.0)
    train(tmp_path, module)
    assert module.rates() == warmed(2 * BATCHES)


@pytest.mark.parametrize(
    ("requirement", "module", "name", "options"),
    [
        (TIMM, "timm.optim.adafactor", "Adafactor", {}),
        (PYTORCH_OPTIMIZER, "pytorch_optimizer.optimizer.adafactor", "AdaFactor", {"lr": None}),
    ],
)
def test_adafactor_is_refused_before_training_unless_it_has_a_rate(
    tmp_path, requirement, module, name, options
):
    adafactor = getattr(peer(requirement, module), name)

    class Own(Walk):
        """Has no rate to look at."""

        def configure_optimizers(self):
            return adafactor(self.parameters(), **options)

        def look(self):
            pass

    module = Own()
    said = f"need a number or a tensor as the lr of every parameter group, got None from {name}: set one"
    with pytest.raises(MisconfigurationException, match=re.escape(said)):
        train(tmp_path, module)
    assert module.position() == (1.0, 1.0)
    said = f"lr of every group (Adafactor: relative_step=False), got '{name} with lr=None'"
    with pytest.raises(ValueError, match=re.escape(said)):
        WarmupDecayLR(adafactor(module.parameters(), **options), warmup_steps=2)
    options["lr"] = 0.01
    train(tmp_path, module)
    assert module.position() < (1.0, 1.0)


def test_adafactor_of_torch_is_warmed_up(tmp_path):
    module = train(tmp_path, Walk(partial(torch.optim.Adafactor, d=1e9)))
    plain = walk(tmp_path, Walk(partial(torch.optim.Adafactor, d=1e9)))
    assert 0 < module.rates()[0][0] < plain.rates()[0][0]
