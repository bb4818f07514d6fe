"""Regrouping an optimizer that was built over bare parameters."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import lr_scheduler

from lightning_lars import LAMB, LARS, ExcludeNormAndBias, build_optimizer
from tests.support.boring import Boring, LogsLoss, trainer
from tests.support.peers import peer

LARS_WITH_DECAY = partial(LARS, lr=0.5, weight_decay=0.1)

SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multi step": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, step_size_up=3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


class Bare(LightningModule):
    """Hands the optimizer bare parameters, in one group or two."""

    def __init__(self, optimizer=LARS_WITH_DECAY, scheduler=None, groups=1):
        super().__init__()
        torch.manual_seed(0)
        self.build, self.schedule, self.groups = optimizer, scheduler, groups
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.rates, self.momenta = [], []

    training_step = Boring.training_step
    train_dataloader = Boring.train_dataloader

    def configure_optimizers(self):
        parameters = list(self.parameters())
        if self.groups == 2:
            parameters = [
                {"params": self.net[:2].parameters(), "name": "body"},
                {"params": self.net[2].parameters(), "name": "head", "lr": 0.1},
            ]
        optimizer = self.build(parameters)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]

    def on_train_batch_start(self, batch, batch_idx):
        groups = self.optimizers().optimizer.param_groups
        self.rates.append([group["lr"] for group in groups])
        self.momenta.append([group.get("momentum", group.get("betas")) for group in groups])


def fit(tmp_path, module, *callbacks, **options):
    trainer(tmp_path, callbacks=list(callbacks), **options).fit(module)
    return module


def test_splits_a_group_into_adapted_and_excluded(tmp_path):
    adapted, excluded = fit(tmp_path, Bare(), ExcludeNormAndBias()).trainer.optimizers[0].param_groups
    assert (adapted["name"], adapted["param_names"]) == ("adapted", ["net.0.weight", "net.2.weight"])
    assert (adapted["layer_adaptation"], adapted["weight_decay"]) == (True, 0.1)
    assert excluded["param_names"] == ["net.0.bias", "net.1.weight", "net.1.bias", "net.2.bias"]
    assert (excluded["layer_adaptation"], excluded["weight_decay"]) == (False, 0.0)
    assert excluded["name"] == "excluded"


def test_keeps_the_groups_that_are_there_apart(tmp_path):
    groups = fit(tmp_path, Bare(groups=2), ExcludeNormAndBias()).trainer.optimizers[0].param_groups
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("body/adapted", 0.5),
        ("body/excluded", 0.5),
        ("head/adapted", 0.1),
        ("head/excluded", 0.1),
    ]


def test_trains_like_an_optimizer_that_was_built_in_groups(tmp_path):
    class Grouped(Bare):
        def configure_optimizers(self):
            return build_optimizer(self, self.build)

    regrouped = fit(tmp_path, Bare(), ExcludeNormAndBias())
    grouped, bare = fit(tmp_path, Grouped()), fit(tmp_path, Bare())
    for name, weight in grouped.state_dict().items():
        assert torch.equal(weight, regrouped.state_dict()[name]), name
    assert not torch.equal(bare.net[0].bias, regrouped.net[0].bias)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_leaves_the_trajectory_of_every_scheduler_as_it_was(tmp_path, scheduler, groups):
    before = fit(tmp_path, Bare(scheduler=scheduler, groups=groups))
    after = fit(tmp_path, Bare(scheduler=scheduler, groups=groups), ExcludeNormAndBias())
    for values in ("rates", "momenta"):
        expected = [[value for value in step for _ in range(2)] for step in getattr(before, values)]
        assert getattr(after, values) == expected
    assert len({tuple(step) for step in before.rates}) > 1


def test_leaves_the_trajectory_of_a_plateau_as_it_was(tmp_path):
    class Plateau(LogsLoss, Bare):
        def configure_optimizers(self):
            optimizer = self.build(self.parameters())
            scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1.0, min_lr=[0.01])
            config = {"scheduler": scheduler, "interval": "step", "monitor": "loss"}
            return {"optimizer": optimizer, "lr_scheduler": config}

    before = fit(tmp_path, Plateau())
    after = fit(tmp_path, Plateau(), ExcludeNormAndBias())
    assert after.rates == [[rate, rate] for (rate,) in before.rates]
    assert before.rates[-1] != before.rates[0]


@pytest.mark.parametrize("optimizer", [partial(LAMB, lr=0.1), partial(LARS, lr=0.5, weight_decay=0.1)])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, optimizer):
    schedule = SCHEDULERS["sequential"]
    straight = fit(tmp_path, Bare(optimizer, schedule), ExcludeNormAndBias(), max_epochs=2)
    first = trainer(tmp_path, callbacks=[ExcludeNormAndBias()])
    first.fit(Bare(optimizer, schedule))
    first.save_checkpoint(tmp_path / "a.ckpt")
    resumed = Bare(optimizer, schedule)
    fit_again = trainer(tmp_path, callbacks=[ExcludeNormAndBias()], max_epochs=2)
    fit_again.fit(resumed, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.rates == straight.rates[8:]
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_frozen_norms_are_excluded_before_they_are_trained(tmp_path):
    module = Bare()
    module.net[1].requires_grad_(False)
    _, excluded = fit(tmp_path, module, ExcludeNormAndBias()).trainer.optimizers[0].param_groups
    assert "net.1.weight" in excluded["param_names"]


def test_patterns_add_to_the_norms(tmp_path):
    module = fit(tmp_path, Bare(), ExcludeNormAndBias(exclude=["net.2.*"], exclude_bias=False))
    adapted, excluded = module.trainer.optimizers[0].param_groups
    assert adapted["param_names"] == ["net.0.weight", "net.0.bias"]
    assert excluded["param_names"] == ["net.1.weight", "net.1.bias", "net.2.weight", "net.2.bias"]


def test_a_pattern_that_matches_nothing_raises(tmp_path):
    with pytest.raises(ValueError, match="got 'head', which matches none"):
        fit(tmp_path, Bare(), ExcludeNormAndBias(exclude=["head"]))


@pytest.mark.parametrize(
    ("switches", "adapted"),
    [
        ({"exclude_norm": False}, ["net.0.weight", "net.1.weight", "net.2.weight"]),
        ({"exclude_bias": False}, ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]),
        ({"exclude_gain": False}, ["gate", "net.0.weight", "net.2.weight"]),
    ],
)
def test_each_default_can_be_switched_off(tmp_path, switches, adapted):
    module = Bare()
    module.gate = nn.Parameter(torch.ones(3))
    groups = fit(tmp_path, module, ExcludeNormAndBias(**switches)).trainer.optimizers[0].param_groups
    assert groups[0]["param_names"] == adapted
    (argument,) = switches
    with pytest.raises(ValueError, match=f"{argument} must be True or False, got 'no'"):
        ExcludeNormAndBias(**{argument: "no"})


def test_groups_made_only_for_weight_decay_are_no_longer_adapted(tmp_path):
    """As many projects part them: norms and biases without decay, but adapted."""

    class Parted(Bare):
        def configure_optimizers(self):
            matrices = [p for p in self.parameters() if p.ndim > 1]
            vectors = {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0}
            return self.build([{"params": matrices}, vectors])

    groups = fit(tmp_path, Parted(), ExcludeNormAndBias()).trainer.optimizers[0].param_groups
    assert [(g["name"], g["layer_adaptation"], g["weight_decay"]) for g in groups] == [
        ("pg1/adapted", True, 0.1),
        ("pg2/excluded", False, 0.0),
    ]


@pytest.mark.parametrize("names", [[None, None], ["body", None], ["body", "body"], [None, "pg1"]])
def test_no_two_groups_have_the_same_name(tmp_path, names):
    class Named(Bare):
        def configure_optimizers(self):
            groups = [{"params": self.net[0].parameters()}, {"params": self.net[1:].parameters(), "lr": 0.1}]
            return self.build([
                {**group, **({} if name is None else {"name": name})}
                for group, name in zip(groups, names, strict=True)
            ])  # fmt: skip

    module = Named()
    logger = CSVLogger(tmp_path)
    fit(tmp_path, module, ExcludeNormAndBias(), LearningRateMonitor(), logger=logger, log_every_n_steps=1)
    groups = module.trainer.optimizers[0].param_groups
    called = [group["name"] for group in groups]
    assert len(set(called)) == 4
    assert sum("excluded" in name for name in called) == 2
    assert {f"lr-LARS/{name}" for name in called} <= set(logger.experiment.metrics_keys)


def test_a_rate_that_is_a_tensor_is_not_shared_between_the_parts(tmp_path):
    schedule = SCHEDULERS["multiplicative"]
    module = fit(tmp_path, Bare(partial(LARS, lr=torch.tensor(0.5)), schedule), ExcludeNormAndBias())
    adapted, excluded = module.trainer.optimizers[0].param_groups
    assert adapted["lr"] is not excluded["lr"]
    assert float(adapted["lr"]) == float(excluded["lr"]) == pytest.approx(0.5 * 0.9**8)


class WithLists:
    """A scheduler that inherits nothing and keeps lists for groups, whatever they are called."""

    def __init__(self, optimizer, **kept):
        self.optimizer = optimizer
        self.t = 0
        vars(self).update(kept)

    def step(self, *_):
        self.t += 1
        assert len(self.optimizer.param_groups) == len(self.base_values)
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = float(self.base_values[index]) * 0.9**self.t

    def state_dict(self):
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state):
        vars(self).update(state)


class Unscheduled(Bare):
    """Steps a scheduler of another package."""

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()


def by_number(values):
    return dict(enumerate(values))


@pytest.mark.parametrize("kind", [list, tuple, by_number, np.fromiter, torch.tensor])
@pytest.mark.parametrize("groups", [1, 2])
def test_lists_of_schedulers_that_are_not_torchs_grow_with_the_groups(tmp_path, groups, kind):
    def schedule(optimizer):
        options = {"dtype": float} if kind is np.fromiter else {}
        return WithLists(optimizer, base_values=kind([g["lr"] for g in optimizer.param_groups], **options))

    before = fit(tmp_path, Unscheduled(scheduler=schedule, groups=groups))
    after = fit(tmp_path, Unscheduled(scheduler=schedule, groups=groups), ExcludeNormAndBias())
    assert after.rates == [[rate for rate in step for _ in range(2)] for step in before.rates]
    assert len({tuple(step) for step in before.rates}) == 8


class Around(WithLists):
    """A scheduler with another inside, as a warmup before it."""

    def step(self, *_):
        self.after.step()


class AroundUnknown(Around):
    """Leaves it to the one inside to know the optimizer."""

    def __init__(self, optimizer, after, **kept):
        self.t = 0
        self.after = [after]

    optimizer = property(lambda self: self.after[0].optimizer)

    def step(self, *_):
        self.after[0].step()


@pytest.mark.parametrize("around", [Around, AroundUnknown])
@pytest.mark.parametrize("inside", ["step", "cyclic", "lambda"])
def test_schedulers_inside_of_others_grow_too(tmp_path, inside, around):
    def schedule(optimizer):
        return around(optimizer, after=SCHEDULERS[inside](optimizer), since=3)

    before = fit(tmp_path, Unscheduled(scheduler=schedule))
    after = fit(tmp_path, Unscheduled(scheduler=schedule), ExcludeNormAndBias())
    assert after.rates == [[rate, rate] for (rate,) in before.rates]
    assert len({tuple(step) for step in before.rates}) > 1


TIMM = {
    "cosine": ("cosine_lr", "CosineLRScheduler", {"t_initial": 8, "warmup_t": 3, "warmup_lr_init": 0.01}),
    "no warmup": ("cosine_lr", "CosineLRScheduler", {"t_initial": 8}),
    "steps": ("multistep_lr", "MultiStepLRScheduler", {"decay_t": [3], "warmup_t": 2}),
    "plateau": ("plateau_lr", "PlateauLRScheduler", {"patience_t": 1, "warmup_t": 2}),
}


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("groups", [1, 2])
def test_timms_schedulers_schedule_both_parts(tmp_path, name, groups):
    file, kind, options = TIMM[name]
    scheduler = getattr(peer("timm==1.0.31", f"timm.scheduler.{file}"), kind)

    class WithTimm(Bare):
        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(self.global_step, 1.0)

    schedule = partial(scheduler, **options)
    before = fit(tmp_path, WithTimm(scheduler=schedule, groups=groups))
    after = fit(tmp_path, WithTimm(scheduler=schedule, groups=groups), ExcludeNormAndBias())
    assert after.rates == [[rate for rate in step for _ in range(2)] for step in before.rates]
    assert len({tuple(step) for step in before.rates}) > 1


def plain(optimizer):
    return [{**group, "params": list(group["params"])} for group in optimizer.param_groups]


class Failing(Bare):
    """Two optimizers with a scheduler each, of which the second cannot be regrouped."""

    def __init__(self, second):
        super().__init__()
        self.second = second
        self.automatic_optimization = False

    def configure_optimizers(self):
        optimizers = [self.build(self.net[:2].parameters()), self.build(self.net[2].parameters())]
        schedulers = [SCHEDULERS["cyclic"](optimizers[0]), self.second(optimizers[1])]
        self.before = (
            [plain(optimizer) for optimizer in optimizers],
            [dict(vars(each)) for each in schedulers],
        )
        return optimizers, schedulers

    lr_scheduler_step = Unscheduled.lr_scheduler_step


FAILURES = {
    "a list that may be of groups": (
        lambda optimizer: WithLists(optimizer, base_values=[0.5], delays=[3]),
        {},
        "cannot regroup LARS, because WithLists keeps 'delays', which may or may not have an entry",
    ),
    "functions that may be of groups": (
        lambda optimizer: WithLists(optimizer, base_values=[0.5], curves=(float,)),
        {},
        "keeps 'curves', which may or may not have an entry",
    ),
    "an array that may be of groups": (
        lambda optimizer: WithLists(optimizer, base_values=[0.5], own=torch.tensor([0.5])),
        {},
        "keeps 'own', which may or may not have an entry",
    ),
    "a dict that may be of groups": (
        lambda optimizer: WithLists(optimizer, base_values=[0.5], own={0: 0.5}),
        {},
        "keeps 'own', which may or may not have an entry",
    ),
    "no rate of its own": (
        lambda optimizer: WithLists(optimizer, base_values=[0.5]),
        {"excluded_lr": 0.01},
        "can give excluded parameters a separate rate only under torch's schedulers, got a WithLists",
    ),
    "an end above the rate": (
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 8, eta_min=0.1),
        {"excluded_lr": 0.01},
        "CosineAnnealingLR must end below .* which is .* with excluded_lr=0.01, got eta_min=0.1",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_regrouping_leaves_everything_unchanged(tmp_path, case):
    second, rate, message = FAILURES[case]
    module = Failing(second)
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        fit(tmp_path, module, ExcludeNormAndBias(**rate))
    groups, attributes = module.before
    assert [plain(optimizer) for optimizer in module.trainer.optimizers] == groups
    schedulers = [config.scheduler for config in module.trainer.lr_scheduler_configs]
    assert [dict(vars(each)) for each in schedulers] == attributes


def test_lists_that_have_another_meaning_stay_as_they_are(tmp_path):
    def schedule(optimizer):
        return WithLists(
            optimizer, base_values=[0.5], milestones=[3], called=["warmup"], longer=[1, 2], named={"a": 1}
        )

    module = fit(tmp_path, Unscheduled(scheduler=schedule), ExcludeNormAndBias())
    scheduler = module.trainer.lr_scheduler_configs[0].scheduler
    assert (scheduler.milestones, scheduler.called, scheduler.longer) == ([3], ["warmup"], [1, 2])
    assert scheduler.base_values == [0.5, 0.5]


class Outer(torch.optim.SGD):
    """An optimizer around another, with groups of its own, as ZeroRedundancyOptimizer."""

    def __init__(self, params, lr):
        params = list(params)
        super().__init__(params, lr=lr)
        self.optim = LARS(params, lr=lr)


def test_an_optimizer_around_another_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="Outer, because the LARS in it has separate groups"):
        fit(tmp_path, Bare(partial(Outer, lr=0.5)), ExcludeNormAndBias())


def test_groups_that_are_apart_already_are_left_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="nothing to split in LARS: its groups are already split"):
        fit(tmp_path, Boring(optimizer=partial(LARS, lr=0.5)), ExcludeNormAndBias())


@pytest.mark.parametrize("kind", [partial(torch.optim.SGD, lr=0.1), partial(LARS, lr=0.5)])
def test_an_optimizer_of_matrices_alone_has_nothing_to_exclude(tmp_path, kind):
    class Matrices(Bare):
        def configure_optimizers(self):
            return kind([p for p in self.parameters() if p.ndim == 2])

    with pytest.warns(UserWarning, match=r"nothing to split in \w+: it holds no parameter to exclude"):
        fit(tmp_path, Matrices(), ExcludeNormAndBias())


def test_an_optimizer_that_takes_a_single_group_is_refused_before_it_is_split(tmp_path):
    module = Bare(torch.optim.LBFGS)
    with pytest.raises(MisconfigurationException, match="cannot regroup LBFGS, whose step takes a single"):
        fit(tmp_path, module, ExcludeNormAndBias())
    (group,) = module.trainer.optimizers[0].param_groups
    assert len(group["params"]) == 6


def test_an_optimizer_of_other_parameters_raises(tmp_path):
    class Stale(Bare):
        def configure_optimizers(self):
            return LARS(nn.Linear(2, 2).parameters(), lr=0.5)

    with pytest.raises(ValueError, match="optimizer must hold parameters of the module, got LARS with none"):
        fit(tmp_path, Stale(), ExcludeNormAndBias())
