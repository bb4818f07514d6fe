"""The learning rates of layers, through every entry point, under schedules, callbacks and checkpoints."""

import sys
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import lr_scheduler

from lightning_lars import (
    LAMB,
    LARS,
    BatchSizeScaling,
    ExcludeNormAndBias,
    LearningRateWarmup,
    ParamGroupSummary,
    TrustRatioMonitor,
    WarmupDecayLR,
    build_optimizer,
    param_groups,
)
from lightning_lars.cli import LargeBatchCLI
from tests.support.boring import trainer
from tests.support.checkpoints import safely
from tests.support.vit import PlainViT, TrainedViT, ViT

LR, DECAY = 0.5, 0.5
STEPS = 8
SCALES = {"layer_0": 0.125, "layer_1": 0.25, "layer_2": 0.5, "layer_3": 1.0}


class Module(TrainedViT):
    """Notes the rates inside of every step."""

    def on_train_start(self):
        self.in_step = []
        hook = lambda o, *_: self.in_step.append(rates_of(o))  # noqa: E731
        self.optimizers().optimizer.register_step_pre_hook(hook)


def module(optimizer=partial(LARS, lr=LR), **options):  # noqa: B008
    torch.manual_seed(0)
    return Module(optimizer=optimizer, **options)


def rates_of(optimizer):
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def configured(scheduler, **options):
    both = module(lr_scheduler=scheduler, lr_scheduler_interval="step", **options).configure_optimizers()
    return both["optimizer"], both["lr_scheduler"]["scheduler"]


SCHEDULERS = {
    "multi step": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8, eta_min=1e-12),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, LR, total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, LR, step_size_up=3, mode="triangular2"),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
    "warmup and decay": lambda o: WarmupDecayLR(o, warmup_steps=3, total_steps=STEPS, end_factor=0.01),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("excluded", [{}, {"excluded_lr": 0.02}, {"excluded_lr_scale": 0.04}])
def test_every_group_follows_the_schedule_at_its_scale(name, excluded):
    plain, plain_schedule = configured(SCHEDULERS[name])
    optimizer, schedule = configured(SCHEDULERS[name], layer_decay=DECAY, **excluded)
    seen = set()
    for _ in range(STEPS):
        rate = plain.param_groups[0]["lr"]
        seen.add(rate)
        for group in optimizer.param_groups:
            scale = SCALES[group["name"].split(".")[0]] * (
                0.04 if excluded and "excluded" in group["name"] else 1
            )
            assert group["lr"] == pytest.approx(rate * scale, rel=1e-9, abs=1e-11), group["name"]
        for each, scheduler in ((plain, plain_schedule), (optimizer, schedule)):
            each.step()
            scheduler.step()
    assert len(seen) > 2


@pytest.mark.parametrize("lr", [LR, torch.tensor(LR)], ids=["float", "tensor"])
@pytest.mark.parametrize("optimizer", [LARS, LAMB, torch.optim.AdamW])
def test_build_optimizer_multiplies_rates_once_and_leaves_the_given_one(lr, optimizer):
    built = build_optimizer(ViT(), optimizer, lr=lr, layer_decay=DECAY, excluded_lr=0.02)
    for group in built.param_groups:
        layer, part = group["name"].split(".")
        base = 0.02 if part == "excluded" else LR
        assert float(group["lr"]) == pytest.approx(base * SCALES[layer])
        assert group["lr_scale"] == SCALES[layer]
        assert type(group["lr"]) is type(lr)
    assert float(lr) == LR


def test_the_only_trained_layer_has_its_scale_under_one_cycle_too():
    probe = module(lr_scheduler=SCHEDULERS["one cycle"], layer_decay=DECAY)
    probe.model.requires_grad_(False)
    probe.model.blocks[1].requires_grad_(True)
    rates = rates_of(probe.configure_optimizers()["optimizer"])
    assert rates == {f"layer_2.{part}": pytest.approx(LR * 0.5 / 25) for part in ("adapted", "excluded")}


class OneRateForAll:
    """A scheduler that inherits nothing and writes one rate into all groups."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group["lr"] = 0.3


class Timm:
    """As timm's, which multiplies the rates of groups by their ``lr_scale``."""

    __module__ = "timm.scheduler.cosine_lr"

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            lambda o: lr_scheduler.CosineAnnealingLR(o, 8, eta_min=0.1),
            "every group, which is 0.\\d+ for 'layer_0.adapted' with layer_decay=0.5, got eta_min=0.1",
        ),
        (
            partial(torch.optim.swa_utils.SWALR, swa_lr=0.1),
            "swa_lr must have a rate for each group with layer_decay=0.5",
        ),
        (OneRateForAll, "layer_decay=0.5 must not be set with OneRateForAll, which sets one learning rate"),
        (Timm, "layer_decay must be None with Timm, which multiplies rates by lr_scale itself, got 0.5"),
        (
            lambda o: lr_scheduler.OneCycleLR(o, [0.1] * 7 + [0.2], total_steps=9),
            "layer_decay=0.5 and the rates of OneCycleLR must agree, got 0.1 for 'layer_1.adapted'",
        ),
    ],
    ids=["ends above", "SWALR", "one rate", "timm", "disagrees"],
)
def test_a_scheduler_that_would_undo_the_scales_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        configured(scheduler, layer_decay=DECAY)


def test_an_optimizer_that_replaces_its_groups_is_refused():
    flat = lambda groups: LARS([{"params": [p for g in groups for _, p in g["params"]]}])  # noqa: E731
    with pytest.raises(ValueError, match=r"layer_decay must be None where the groups .* no lr and lr_scale"):
        build_optimizer(ViT(), flat, layer_decay=DECAY)


def test_parts_of_a_model_have_layers_of_their_own():
    model = ViT()
    groups = param_groups(model.blocks, prefix="blocks", layer_decay=DECAY, lr=1.0)
    optimizer = LARS([*groups, *param_groups(model.head, prefix="head")], lr=LR)
    assert rates_of(optimizer) == {
        "blocks.layer_1.adapted": 0.25,
        "blocks.layer_1.excluded": 0.25,
        "blocks.layer_2.adapted": 0.5,
        "blocks.layer_2.excluded": 0.5,
        "head.adapted": LR,
        "head.excluded": LR,
    }


def test_callbacks_and_loggers_show_and_scale_the_rate_of_every_layer(tmp_path, capsys, caplog):
    net = module(layer_decay=DECAY, excluded_lr=0.02)
    callbacks = [
        BatchSizeScaling(2, "linear", batch_size=4),
        LearningRateWarmup(warmup_steps=2, start_factor=0.5),
    ]
    callbacks += [LearningRateMonitor("step"), TrustRatioMonitor(layers="*"), ParamGroupSummary()]
    logger = CSVLogger(tmp_path)
    with caplog.at_level("INFO"):
        trainer(tmp_path, callbacks=callbacks, logger=logger, log_every_n_steps=1, max_steps=3).fit(net)
    (said,) = [record.message for record in caplog.records if "BatchSizeScaling" in record.message]
    assert "LARS/layer_3.adapted 0.5 -> 1, LARS/layer_3.excluded 0.02, a separate rate" in said
    assert "likewise 6 groups with a smaller lr_scale)." in said
    assert "layer_2" not in said
    for rates, warmup in zip(net.in_step, (0.75, 1.0, 1.0), strict=True):
        for name, rate in rates.items():
            layer, part = name.split(".")
            base = 0.02 if part == "excluded" else 2 * LR
            assert rate == pytest.approx(base * SCALES[layer] * warmup), name
    logged = set(logger.experiment.metrics_keys)
    assert {f"lr-LARS/{name}" for name in net.in_step[0]} <= logged
    assert any("model.blocks.0.linear.weight" in key for key in logged), logged
    printed = capsys.readouterr().out
    assert "layer_2.excluded" in printed
    assert "own rule" not in printed


def test_resuming_in_the_middle_is_exact(tmp_path):
    def run(epochs, **options):
        schedule = partial(WarmupDecayLR, warmup_steps=2, total_steps=6)
        net = module(partial(LAMB, lr=0.01), lr_scheduler=schedule, layer_decay=DECAY)
        fit = trainer(tmp_path, max_epochs=epochs, limit_train_batches=3)
        fit.fit(net, **options)
        return net, fit

    whole, uninterrupted = run(2)
    run(1)[1].save_checkpoint(tmp_path / "middle.ckpt")
    resumed, after = run(2, ckpt_path=tmp_path / "middle.ckpt")
    assert rates_of(uninterrupted.optimizers[0]) == rates_of(after.optimizers[0])
    assert len(resumed.in_step) == 3
    assert resumed.in_step == whole.in_step[3:]
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("scheduler", [None, SCHEDULERS["cosine"]])
def test_a_rate_that_the_callback_sets_is_multiplied_too(tmp_path, scheduler):
    class Built(PlainViT):
        def configure_optimizers(self):
            optimizer = build_optimizer(self, LARS, lr=LR, layer_decay=DECAY)
            return optimizer if scheduler is None else [[optimizer], [scheduler(optimizer)]]

    net = Built()
    fit = trainer(tmp_path, callbacks=[ExcludeNormAndBias(excluded_lr=0.02)], max_steps=1)
    with pytest.warns(UserWarning, match="its groups are already split"):
        fit.fit(net)
    rates = rates_of(fit.optimizers[0])
    assert rates["layer_3.excluded"] == 0.02
    assert rates["layer_1.excluded"] == 0.02 * 0.25
    assert rates["layer_1.adapted"] == LR * 0.25


def test_a_file_gives_the_layers_to_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    config = tmp_path / "config.yaml"
    config.write_text(
        "seed_everything: 0\n"
        "optimizer:\n  class_path: torch.optim.AdamW\n  init_args: {lr: 0.5, weight_decay: 0.05}\n"
        "lr_scheduler:\n  class_path: torch.optim.lr_scheduler.OneCycleLR\n"
        "  init_args: {max_lr: 0.5, total_steps: 9}\n"
        "lr_scheduler_interval: step\n"
        "param_groups:\n  layer_decay: 0.5\n  layer_depth: {model.pos_embed: 3}\n"
        "trainer: {accelerator: cpu, fast_dev_run: 1, enable_progress_bar: false}\n"
    )
    cli = LargeBatchCLI(PlainViT, args=["--config", str(config)], run=False)
    cli.trainer.fit(cli.model)
    (optimizer,) = cli.trainer.optimizers
    assert {group["name"]: group["initial_lr"] for group in optimizer.param_groups} == {
        f"{layer}.{part}": pytest.approx(LR * scale / 25)
        for layer, scale in SCALES.items()
        for part in ("adapted", "excluded")
    }
    assert "model.pos_embed" in optimizer.param_groups[-1]["param_names"]


def tokens_last(name):
    return 3 if name.endswith("cls_token") else None


class Saved(TrainedViT):
    def __init__(self, layer_depth=None, **options):
        super().__init__(layer_depth=layer_depth, **options)
        self.save_hyperparameters("layer_depth")


@pytest.mark.parametrize("layer_depth", [tokens_last, {"*.cls_token": 3}])
def test_a_checkpoint_keeps_the_layers_that_are_given(tmp_path, layer_depth):
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(Saved(layer_decay=DECAY, layer_depth=layer_depth))
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = safely(Saved.load_from_checkpoint, tmp_path / "saved.ckpt", layer_decay=DECAY)
    assert loaded.hparams.layer_depth == layer_depth
    names = loaded.configure_optimizers().param_groups[-1]["param_names"]
    assert names == ["model.cls_token", "model.norm.weight", "model.norm.bias", "model.head.bias"]


def test_the_mixin_checks_its_arguments_at_once():
    with pytest.raises(ValueError, match="layer_decay must be above 0 and at most 1, got 2"):
        module(layer_decay=2)
    with pytest.raises(ValueError, match="layer_depth must be None without layer_decay"):
        module(layer_depth={"head.*": 1})
    assert isinstance(module().model.blocks, nn.ModuleList)


def test_a_schedule_that_does_not_multiply_by_the_scales_says_so():
    groups = param_groups(PlainViT(), layer_decay=DECAY)
    with pytest.warns(
        UserWarning, match=r"got groups with 4 different ones and the same lr, 0\.5: layer_decay"
    ):
        WarmupDecayLR(LARS(groups, lr=LR), warmup_steps=3, total_steps=STEPS)
    # Warnings are errors.
    for optimizer in (
        LARS(param_groups(PlainViT(), layer_decay=DECAY, lr=LR), lr=LR),
        build_optimizer(PlainViT(), LARS, lr=LR, layer_decay=DECAY),
        build_optimizer(PlainViT(), LARS, lr=LR),
    ):
        WarmupDecayLR(optimizer, warmup_steps=3, total_steps=STEPS)
