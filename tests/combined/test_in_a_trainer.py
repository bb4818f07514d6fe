"""A second optimizer for matrices under a Trainer, with its callbacks, and from the command line."""

import copy
import pickle
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning import seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import SGD, AdamW, lr_scheduler

from lightning_lars import (
    LAMB,
    LARS,
    BatchSizeScaling,
    CombinedOptimizer,
    ExcludeNormAndBias,
    LearningRateWarmup,
    ParamGroupSummary,
    TrustRatioMonitor,
    WarmupDecayLR,
    build_optimizer,
    param_groups,
)
from lightning_lars.cli import LargeBatchCLI
from lightning_lars.trainer.strategy_checks import check_strategy
from tests.support.boring import trainer
from tests.support.muon import MUON, needs_muon
from tests.support.vit import PlainViT, TrainedViT

MOMENTUM = partial(SGD, lr=0.1, momentum=0.9)
BY = [
    pytest.param(lambda groups: MUON(groups, lr=0.1), id="Muon", marks=needs_muon),
    pytest.param(MOMENTUM, id="SGD"),
]
LAMB_REST = partial(LAMB, lr=0.01)


def vit(**options):
    torch.manual_seed(0)
    return TrainedViT(**{"optimizer": LAMB_REST, "matrix_optimizer": MOMENTUM, **options})


class ByHand(PlainViT):
    """Steps the two optimizers by hand, with rates of the same schedule, warmup and scaling."""

    def __init__(self, matrix_optimizer):
        torch.manual_seed(0)
        super().__init__()
        *rest, matrices = param_groups(self, matrices=True)
        self.both = [LAMB_REST(rest), matrix_optimizer([matrices])]

    def train(self, batches, rates):
        for batch, rate in zip(batches, rates, strict=True):
            for each, base in zip(self.both, (0.01, 0.1), strict=True):
                each.zero_grad()
                for group in each.param_groups:
                    group["lr"] = base * rate
            self.training_step(batch, 0).backward()
            for each in self.both:
                each.step()


@pytest.mark.parametrize("matrix_optimizer", BY)
def test_schedule_warmup_and_scaling_act_on_both_as_by_hand(tmp_path, matrix_optimizer):
    net = vit(
        matrix_optimizer=matrix_optimizer,
        lr_scheduler=partial(lr_scheduler.StepLR, step_size=1, gamma=0.5),
        lr_scheduler_interval="step",
    )
    callbacks = [
        LearningRateWarmup(warmup_steps=4, start_factor=0.2),
        BatchSizeScaling(base_batch_size=1, rule="linear"),
    ]
    trainer(tmp_path, max_steps=6, callbacks=callbacks).fit(net)
    other = ByHand(matrix_optimizer)
    # The first step has warmed up by one quarter; a batch has 2 images.
    rates = [2 * 0.5**step * min(1.0, 0.2 + 0.8 * (step + 1) / 4) for step in range(6)]
    other.train(list(other.train_dataloader())[:6], rates)
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("matrix_optimizer", BY)
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, matrix_optimizer):
    options = {
        "matrix_optimizer": matrix_optimizer,
        "lr_scheduler": partial(WarmupDecayLR, warmup_steps=2, total_steps=16),
        "excluded_lr": 0.002,
        "layer_decay": 0.75,
    }

    def callbacks():
        return [LearningRateWarmup(warmup_steps=4), BatchSizeScaling(base_batch_size=1)]

    straight, stopped, resumed = vit(**options), vit(**options), vit(**options)
    whole = trainer(tmp_path, max_epochs=2, callbacks=callbacks())
    whole.fit(straight)
    first = trainer(tmp_path, max_epochs=1, callbacks=callbacks())
    first.fit(stopped)
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer(tmp_path, max_epochs=2, callbacks=callbacks())
    again.fit(resumed, ckpt_path=tmp_path / "a.ckpt")
    for (name, p), q in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    left, right = whole.optimizers[0].state_dict(), again.optimizers[0].state_dict()
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys() != set()
    for number, state in left["state"].items():
        for key, value in state.items():
            assert torch.equal(value, right["state"][number][key]), (number, key)


SCHEDULERS = {
    "one rate for all": (partial(lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=10, cycle_momentum=False),
                         {"adapted": 0.01, "excluded": 0.002, "matrices": 0.1}),
    "a rate for each": (partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0),
                        {"adapted": 0.01, "excluded": 0.002, "matrices": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize(("scheduler", "peaks"), SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("excluded", [{"excluded_lr": 0.002}, {"excluded_lr_scale": 0.2}])
def test_the_rate_of_the_matrices_is_their_peak_under_any_schedule(scheduler, peaks, excluded):
    configured = vit(lr_scheduler=scheduler, lr_scheduler_interval="step", **excluded).configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    highest = dict.fromkeys(peaks, 0.0)
    for _ in range(10):
        for group in optimizer.param_groups:
            highest[group["name"]] = max(highest[group["name"]], group["lr"])
        optimizer.step()
        if schedule.last_epoch < 9:
            schedule.step()
    assert highest == {name: pytest.approx(peak) for name, peak in peaks.items()}


def test_the_rate_of_the_excluded_is_no_factor_on_that_of_the_matrices():
    net = vit(exclude=["*"], excluded_lr_scale=0.2, lr_scheduler=SCHEDULERS["a rate for each"][0])
    with pytest.raises(ValueError, match="matrix_optimizer must be None where there is no matrix"):
        net.configure_optimizers()
    net = vit(
        exclude=["*patch_embed*", "*head*"],
        excluded_lr_scale=0.2,
        lr_scheduler=SCHEDULERS["a rate for each"][0],
    )
    groups = net.configure_optimizers()["optimizer"].param_groups
    assert [(group["name"], group["lr"]) for group in groups] == [("excluded", 0.002), ("matrices", 0.1)]


class OneRateForAll(lr_scheduler.LRScheduler):
    def get_lr(self):
        return [0.1 for _ in self.base_lrs]


def test_schedules_that_leave_the_matrices_no_rate_of_their_own_are_refused():
    with pytest.raises(ValueError, match=r"OneCycleLR must agree, got 0.01 for 'matrices'"):
        vit(lr_scheduler=partial(lr_scheduler.OneCycleLR, max_lr=[0.02, 0.02, 0.01], total_steps=9,
                                 cycle_momentum=False)).configure_optimizers()  # fmt: skip
    with pytest.raises(ValueError, match="matrix_optimizer must not be set with OneRateForAll"):
        vit(lr_scheduler=OneRateForAll).configure_optimizers()
    with pytest.raises(
        ValueError,
        match=r"must end below .* with the lr of matrix_optimizer, got eta_min=0.2",
    ):
        vit(lr_scheduler=partial(lr_scheduler.CosineAnnealingLR, T_max=9, eta_min=0.2)).configure_optimizers()


def test_callbacks_look_at_each_of_the_two(tmp_path, capsys):
    net = vit()
    logger = CSVLogger(tmp_path)
    callbacks = [
        ParamGroupSummary(),
        TrustRatioMonitor("*", table=True, report="report.html"),
        LearningRateMonitor(),
    ]
    trainer(
        tmp_path, max_steps=3, log_every_n_steps=1, logger=logger, callbacks=callbacks, num_sanity_val_steps=0
    ).fit(net)
    printed = capsys.readouterr().out
    assert "Parameter groups of LAMB, SGD" in printed
    assert "SGD does not read" not in printed
    row = next(line for line in printed.splitlines() if "blocks" in line and "linear.weight" in line)
    assert "matrices" in row
    assert "matrix" in row.split("matrices")[1]
    keys = (tmp_path / logger.log_dir / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "lr-CombinedOptimizer/matrices" in keys
    assert "trust_ratio/LAMB/median" in keys
    assert "trust_ratio_per_layer/LAMB/model.head.weight" in keys
    assert "update_to_weight_per_layer/SGD/model.blocks.0.linear.weight" in keys
    assert "trust_ratio/SGD/median" not in keys
    assert "matrices" in (tmp_path / logger.log_dir / "report.html").read_text()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_clips_and_scales_gradients_of_both(tmp_path, precision):
    net = vit(optimizer=partial(AdamW, lr=0.01, fused=True), excluded_lr=0.002)
    before = copy.deepcopy(net.state_dict())
    plugins = {}
    if precision == "16-mixed":  # Lightning's scaler on the CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        plugins = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    else:
        plugins = {"precision": precision}
    fit = trainer(tmp_path, max_steps=2, gradient_clip_val=0.1, callbacks=[LearningRateWarmup(2)], **plugins)
    fit.fit(net)
    assert all(not torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_clipping_by_both_the_trainer_and_lamb_raises_a_warning(tmp_path):
    net = vit(optimizer=partial(LAMB, lr=0.01, max_grad_norm=1.0))
    with pytest.warns(UserWarning, match="gradients are clipped twice: .* LAMB"):
        trainer(tmp_path, max_steps=1, gradient_clip_val=1.0).fit(net)


class DeepSpeedStrategy:
    """What the check reads of Lightning's."""

    def __init__(self):
        self.config = {"zero_optimization": {"stage": 2}}


def test_deepspeed_zero_is_refused_for_lamb_beside_another_optimizer():
    net = vit()
    optimizer = net.configure_optimizers()
    module = SimpleNamespace(trainer=SimpleNamespace(strategy=DeepSpeedStrategy()))
    with pytest.raises(MisconfigurationException, match="LAMB cannot compute the norms of layers"):
        check_strategy(module, optimizer)


class Unsplit(PlainViT):
    """Builds the two optimizers over bare parameters."""

    def configure_optimizers(self):
        hidden = [block.linear.weight for block in self.model.blocks]
        rest = [p for p in self.parameters() if not any(p is each for each in hidden)]
        return CombinedOptimizer([LARS(rest, lr=1.0), SGD(hidden, lr=0.1)])


def test_an_existing_one_is_split_into_adapted_and_excluded_groups(tmp_path):
    net = Unsplit()
    fit = trainer(tmp_path, max_steps=2, callbacks=[ExcludeNormAndBias(excluded_lr=0.05)])
    fit.fit(net)
    (optimizer,) = fit.optimizers
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        ("pg1/adapted", 1.0),
        ("pg1/excluded", 0.05),
        ("pg2/adapted", 0.1),
    ]
    lars, sgd = optimizer.optimizers
    assert [len(each.param_groups) for each in (lars, sgd)] == [2, 1]
    assert not any("bias" in name for name in lars.trust_ratios())


CONFIG = """
seed_everything: 0
optimizer: {class_path: lightning_lars.LAMB, init_args: {lr: 0.01}}
lr_scheduler: {class_path: torch.optim.lr_scheduler.OneCycleLR, init_args: {max_lr: 0.01, total_steps: 9,
               cycle_momentum: false}}
lr_scheduler_interval: step
param_groups:
  excluded_lr: 0.002
  matrix_optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5, momentum: 0.9}}
  matrices: {model.head.weight: true, model.blocks.1.*: false}
trainer: {accelerator: cpu, fast_dev_run: 2, enable_progress_bar: false}
"""


def test_a_file_gives_both_optimizers_to_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    cli = LargeBatchCLI(PlainViT, args=["--config", str(config)], run=False)
    sent = pickle.loads(pickle.dumps(cli.model))
    cli.trainer.fit(cli.model)
    for optimizer in (cli.trainer.optimizers[0], sent.configure_optimizers()["optimizer"]):
        rates = {group["name"]: group["initial_lr"] * 25 for group in optimizer.param_groups}
        assert rates == {name: pytest.approx(rate) for name, rate in
                         {"adapted": 0.01, "excluded": 0.002, "matrices": 0.5}.items()}  # fmt: skip
        assert optimizer.param_groups[2]["param_names"] == [
            "model.blocks.0.linear.weight",
            "model.head.weight",
        ]
        assert optimizer.param_groups[2]["momentum"] == 0.9


@needs_muon
def test_arguments_give_muon_to_the_command_line_and_to_the_mixin(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    quiet = ["--trainer.accelerator=cpu", "--trainer.fast_dev_run=1", "--trainer.enable_progress_bar=false"]
    rest = ["--optimizer=lightning_lars.LAMB", "--optimizer.lr=0.01"]
    muon = ["--param_groups.matrix_optimizer=torch.optim.Muon", "--param_groups.matrix_optimizer.lr=0.02"]
    cli = LargeBatchCLI(PlainViT, args=[*rest, *muon, *quiet], run=False)
    cli.trainer.fit(cli.model)
    of_mixin = [argument.replace("param_groups.", "model.") for argument in muon]
    of_mixin += ["--model.optimizer=lightning_lars.LAMB", "--model.optimizer.lr=0.01"]
    other = LargeBatchCLI(TrainedViT, args=[*of_mixin, *quiet], run=False)
    other.trainer.fit(other.model)
    for each in (cli, other):
        kinds = [type(part).__name__ for part in each.trainer.optimizers[0].optimizers]
        assert kinds == ["LAMB", "Muon"]
        assert [group["lr"] for group in each.trainer.optimizers[0].param_groups] == [0.01, 0.01, 0.02]


class Saved(TrainedViT):
    def __init__(self, optimizer=LAMB_REST, matrix_optimizer=MOMENTUM, matrices=None, **options):
        super().__init__(optimizer=optimizer, matrix_optimizer=matrix_optimizer, matrices=matrices, **options)
        self.save_hyperparameters()


def test_a_checkpoint_keeps_the_optimizer_for_matrices(tmp_path):
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(Saved(matrices={"*.head.weight": True}))
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = Saved.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    optimizer = loaded.configure_optimizers()
    assert "model.head.weight" in optimizer.param_groups[2]["param_names"]
    assert optimizer.param_groups[2]["lr"] == 0.1
    assert loaded.hparams_initial["matrix_optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9}


def test_the_mixin_refuses_what_is_no_optimizer_when_it_is_built():
    with pytest.raises(TypeError, match="matrix_optimizer must be an optimizer class or a callable"):
        TrainedViT(matrix_optimizer="Muon")
    with pytest.raises(ValueError, match="matrices must be None without matrix_optimizer"):
        TrainedViT(matrices={"*": True})


@pytest.mark.slow
def test_a_compiled_step_is_the_step_of_both():
    seed_everything(0, verbose=False)
    nets = [PlainViT() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [
        build_optimizer(net, partial(AdamW, lr=0.01), matrix_optimizer=MOMENTUM, excluded_lr=0.001)
        for net in nets
    ]
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, backend="eager")]
    for _ in range(2):
        for net, optimizer, step in zip(nets, optimizers, steps, strict=True):
            optimizer.zero_grad()
            net.training_step(next(iter(net.train_dataloader())), 0).backward()
            step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)
