"""Recipes have the numbers of their sources, and are the same as functions and as YAML."""

import math
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_lars import LAMB, LARS, TrustRatioMonitor, build_optimizer, recipes
from lightning_lars.cli import LargeBatchCLI
from tests.support.boring import Boring, Plain, boring, trainer
from tests.support.vit import PlainViT, TrainedViT, ViT

FOLDER = Path(__file__).parents[1] / "examples/recipes"
EPOCH = 312  # steps of ImageNet at batch 4096, as loaders that drop the last batch have


def cosine(peak, warmup, total, start=0.0, end=0.0):
    """Return the schedule of the self-supervised sources, by the step from 0."""

    def rate(step):
        if step < warmup:
            return start + (peak - start) * step / warmup
        return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

    return rate


def polynomial(peak, warmup, total, power, end=0.0):
    def rate(step):
        if step < warmup:
            return peak * step / warmup
        return end + (peak - end) * (1 - (step - warmup) / (total - warmup)) ** power

    return rate


# Recipe, steps of the training, and what the source has: optimizer, schedule, scale of what is excluded.
SSL = {"momentum": 0.9, "weight_decay": 1e-6, "trust_coefficient": 0.001, "denominator": "decayed_gradient"}
# What timm's LAMB and apex's, which the recipes train with, do by default.
TIMM = {
    "betas": (0.9, 0.999),
    "bias_correction": True,
    "grad_averaging": True,
    "max_grad_norm": 1.0,
    "trust_clip": None,
}
CASES = {
    "simclr": (
        recipes.simclr(),
        100 * EPOCH,
        (LARS, {**SSL, "lr": 0.3 * 4096 / 256, "eps": 0.0, "lr_in_momentum": True}),
        cosine(4.8, 10 * EPOCH, 100 * EPOCH),
        1.0,
    ),
    "byol": (
        recipes.byol(),
        1000 * EPOCH,
        (LARS, {**SSL, "lr": 0.2 * 16, "weight_decay": 1.5e-6, "eps": 0.0, "lr_in_momentum": False}),
        cosine(3.2, 10 * EPOCH, 1000 * EPOCH),
        1.0,
    ),
    "barlow_twins": (
        recipes.barlow_twins(),
        1000 * 626,
        (LARS, {**SSL, "lr": 0.2 * 8, "eps": 0.0, "lr_in_momentum": False}),
        cosine(1.6, 10 * 626, 1000 * 626, end=1.6e-3),
        0.024,
    ),
    "swav": (
        recipes.swav(),
        800 * EPOCH,
        (LARS, {**SSL, "lr": 4.8, "denominator": "gradient", "trust_clip": None, "eps": 1e-8}),
        cosine(4.8, 10 * EPOCH, 800 * EPOCH, start=0.3, end=0.0048),
        None,
    ),
    "moco_v3": (
        recipes.moco_v3(),
        300 * EPOCH,
        (LARS, {**SSL, "lr": 0.3 * 16, "eps": 0.0, "lr_in_momentum": False}),
        cosine(4.8, 10 * EPOCH, 300 * EPOCH),
        1.0,
    ),
    "vicreg": (
        recipes.vicreg(),
        1000 * 626,
        (LARS, {**SSL, "lr": 0.2 * 2048 / 256, "eps": 0.0, "lr_in_momentum": False}),
        cosine(1.6, 10 * 626, 1000 * 626, end=1.6e-3),
        1.0,
    ),
    **{
        f"resnet_strikes_back_{name.lower()}": (
            recipes.resnet_strikes_back(name),
            epochs * 625,
            (LAMB, {**TIMM, "lr": lr, "eps": 1e-6, "weight_decay": weight_decay}),
            cosine(lr, 5 * 625, epochs * 625),
            1.0,
        )
        for name, epochs, lr, weight_decay in (
            ("A1", 600, 0.005, 0.01),
            ("A2", 300, 0.005, 0.02),
            ("A3", 100, 0.008, 0.02),
        )
    },
    "deit3_base": (
        recipes.deit3("base"),
        800 * 625,
        (LAMB, {**TIMM, "lr": 3e-3, "eps": 1e-8, "weight_decay": 0.05}),
        cosine(3e-3, 5 * 625, 800 * 625, start=1e-6, end=1e-5),
        1.0,
    ),
    "mae_linear_probing": (
        recipes.mae_linear_probing(),
        90 * 78,
        (LARS, {**SSL, "lr": 0.1 * 16384 / 256, "weight_decay": 0, "eps": 0.0, "lr_in_momentum": False}),
        cosine(6.4, 10 * 78, 90 * 78),
        1.0,
    ),
    "mae_finetuning_base": (
        recipes.mae_finetuning("base"),
        100 * 1251,
        (torch.optim.AdamW, {"lr": 5e-4 * 1024 / 256, "betas": (0.9, 0.999), "weight_decay": 0.05}),
        cosine(2e-3, 5 * 1251, 100 * 1251, end=1e-6),
        1.0,
    ),
    "moco_v3_linear_probing": (
        recipes.moco_v3_linear_probing("resnet50"),
        90 * 1252,
        (torch.optim.SGD, {"lr": 0.1 * 1024 / 256, "momentum": 0.9, "weight_decay": 0, "nesterov": False}),
        cosine(0.4, 0, 90 * 1252),
        1.0,
    ),
    "mlperf_resnet50_4096": (
        recipes.mlperf_resnet50(4096),
        40 * 313,
        (LARS, {"lr": 10.0, "momentum": 0.9, "weight_decay": 2e-4, "eps": 0.0, "lr_in_momentum": True}),
        polynomial(10.0, 5 * 313, 40 * 313, 2, end=1e-4),
        1.0,
    ),
    "mlperf_resnet50_32768": (
        recipes.mlperf_resnet50(32768),
        56 * 40,
        (LARS, {"lr": 21.2, "momentum": 0.94, "weight_decay": 2.5e-5, "denominator": "gradient"}),
        polynomial(21.2, 16 * 40, 56 * 40, 2, end=1e-4),
        1.0,
    ),
    "mlperf_bert_4096": (
        recipes.mlperf_bert(4096),
        855,
        (
            LAMB,
            {"lr": 2.4e-3, "betas": (0.66, 0.998), "eps": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0},
        ),
        polynomial(2.4e-3, 0, 855, 1),
        1.0,
    ),
    "lars_2048": (
        recipes.lars(2048),
        200,
        (LARS, {"lr": 24.0, "momentum": 0.9, "weight_decay": 2e-3, "trust_clip": 0.02}),
        polynomial(24.0, 20, 200, 1),
        0.05 / 24,
    ),
    "lamb_2048": (
        recipes.lamb(2048),
        200,
        (LAMB, {"lr": 0.03, "weight_decay": 0.04, "trust_clip": 0.5, "max_grad_norm": 1.0}),
        polynomial(0.03, 20, 200, 1),
        0.01 / 0.03,
    ),
}
FINE_TUNING = "mae_finetuning_base"
every_recipe = pytest.mark.parametrize("name", CASES)


def built(recipe):
    """An optimizer and a scheduler of a recipe, as the mixin builds them."""
    optimizer = module_for(recipe)(**{**recipe, "lr_scheduler": None}).configure_optimizers()
    return optimizer, recipe["lr_scheduler"](optimizer)


def module_for(recipe):
    return boring if recipe["layer_decay"] is None else vit


def vit(**options):
    torch.manual_seed(0)
    return TrainedViT(**options)


def of_last_layer(groups):
    """The groups without a scale: all, or those of the last layer."""
    return [group for group in groups if group.get("lr_scale", 1.0) == 1.0]


def values(groups):
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


@every_recipe
def test_the_optimizer_has_the_numbers_of_the_source(name):
    recipe, _, (optimizer_class, numbers), _, excluded_lr_scale = CASES[name]
    optimizer, _ = built(recipe)
    assert type(optimizer) is optimizer_class
    adapted, *excluded = of_last_layer(optimizer.param_groups)
    for key, number in numbers.items():
        of_group = adapted["initial_lr" if key == "lr" else key]
        assert of_group == (pytest.approx(number) if isinstance(number, float) else number), key
    if excluded_lr_scale is None:  # apex LARC adapts and decays everything
        assert not excluded
        assert adapted["layer_adaptation"]
        assert adapted["param_names"] == [name for name, _ in boring().named_parameters()]
    else:
        (group,) = excluded
        assert group["initial_lr"] == pytest.approx(numbers["lr"] * excluded_lr_scale)
        assert not group["layer_adaptation"]
        assert group["weight_decay"] == 0


@every_recipe
def test_the_schedule_matches_the_source(name):
    """From the end of the warmup on at the same step, within it one step ahead."""
    recipe, total_steps, _, rate, _ = CASES[name]
    optimizer, scheduler = built(recipe)
    scheduler.set_total_steps(total_steps)
    optimizer.step()
    warmup = scheduler.warmup_steps
    in_warmup = {1, warmup // 2, warmup - 1} if warmup else set()
    for step in sorted({*in_warmup, warmup + 1, (warmup + total_steps) // 2, total_steps - 1, total_steps}):
        scheduler.last_epoch = step - 2
        scheduler.step()
        expected = rate(step if step < warmup else step - 1)
        assert of_last_layer(optimizer.param_groups)[0]["lr"] == pytest.approx(expected, rel=1e-12), step


@every_recipe
def test_yaml_and_function_build_the_same(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.chdir(tmp_path)
    recipe, total_steps, *_ = CASES[name]
    arguments = ["--config", str(FOLDER / f"{name}.yaml"), "--seed_everything=0", "--trainer.fast_dev_run=2"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    if name != "mlperf_bert_4096":  # whose length is part of the recipe
        arguments.append(f"--lr_scheduler.init_args.total_steps={total_steps}")

    cli = LargeBatchCLI(PlainViT if name == FINE_TUNING else Plain, args=arguments, run=False)
    cli.trainer.fit(cli.model)
    module = module_for(recipe)(**recipe)
    own = trainer(tmp_path, fast_dev_run=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_build_lr_scheduler", with_length(recipe["lr_scheduler"], total_steps))
        own.fit(module)

    assert type(cli.trainer.optimizers[0]) is type(own.optimizers[0])
    assert values(cli.trainer.optimizers[0].param_groups) == values(own.optimizers[0].param_groups)
    schedulers = [each.lr_scheduler_configs[0].scheduler.state_dict() for each in (cli.trainer, own)]
    assert schedulers[0] == schedulers[1]
    assert schedulers[0]["total_steps"] == total_steps


def with_length(build, total_steps):
    def scheduler(optimizer):
        built = build(optimizer)
        built.set_total_steps(total_steps)
        return built

    return scheduler


def test_every_yaml_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(CASES)


def test_a_recipe_is_unpacked_into_the_mixin_and_as_long_as_the_run(tmp_path):
    module = boring(**recipes.barlow_twins(batch_size=64, steps_per_epoch=1))
    own = trainer(tmp_path, max_epochs=3)
    own.fit(module)
    scheduler = own.lr_scheduler_configs[0].scheduler
    assert (scheduler.total_steps, scheduler.warmup_steps) == (24, 10)
    assert own.optimizers[0].param_groups[1]["initial_lr"] == pytest.approx(0.0048 * 64 / 256)


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: recipes.mlperf_resnet50(4095), "batch_size must be one of .*4096.* got 4095"),
        (lambda: recipes.mlperf_bert(8192), "batch_size must be one of .*6912.* got 8192"),
        (lambda: recipes.byol(epochs=200), "epochs must be one of .*1000.* got 200"),
        (lambda: recipes.moco_v3(epochs=40), "epochs must be one of .*300.* got 40"),
        (lambda: recipes.vicreg(epochs=300), "epochs must be one of .*1000.* got 300"),
        (lambda: recipes.resnet_strikes_back("a1"), "procedure must be one of .*'A1'.* got 'a1'"),
        (lambda: recipes.deit3("tiny"), "model must be one of .*'base'.* got 'tiny'"),
        (lambda: recipes.deit3_imagenet21k("base", 1), "stage must be one of .*'finetuning'.* got 'base'"),
        (lambda: recipes.mae_finetuning("small"), "model must be one of .*'huge'.* got 'small'"),
        (lambda: recipes.moco_v3_linear_probing("base"), "model must be one of .*'vit'.* got 'base'"),
    ],
)
def test_a_row_that_the_source_does_not_have_raises(build, argument):
    with pytest.raises(ValueError, match=argument):
        build()


BY_BATCH_SIZE = {
    "simclr": recipes.simclr,
    "byol": recipes.byol,
    "barlow_twins": recipes.barlow_twins,
    "moco_v3": recipes.moco_v3,
    "vicreg": recipes.vicreg,
    "mae_linear_probing": recipes.mae_linear_probing,
    "mae_finetuning": lambda batch_size: recipes.mae_finetuning("base", batch_size),
    "moco_v3_linear_probing": lambda batch_size: recipes.moco_v3_linear_probing("vit", batch_size),
}


@pytest.mark.parametrize("value", [0, -5, "2048", 2048.0, True, None])
@pytest.mark.parametrize("name", BY_BATCH_SIZE)
def test_a_batch_size_is_a_whole_number(name, value):
    with pytest.raises(ValueError, match=f"batch_size must be an integer above 0, got {value!r}"):
        BY_BATCH_SIZE[name](value)


@pytest.mark.parametrize("value", [0, -1, 1.5, "312", True])
@pytest.mark.parametrize(
    "build",
    [
        recipes.simclr,
        recipes.byol,
        recipes.barlow_twins,
        recipes.swav,
        recipes.moco_v3,
        recipes.vicreg,
        recipes.mae_linear_probing,
        partial(recipes.mae_finetuning, "base"),
        partial(recipes.resnet_strikes_back, "A1"),
        partial(recipes.deit3, "base"),
        partial(recipes.deit3_imagenet21k, "pretraining"),
        partial(recipes.mlperf_resnet50, 4096),
    ],
)
def test_the_steps_of_an_epoch_are_a_whole_number(build, value):
    with pytest.raises(ValueError, match=f"steps_per_epoch must be an integer above 0, got {value!r}"):
        build(steps_per_epoch=value)


def test_rates_follow_epochs_and_batch_size():
    rates = {
        recipe["optimizer"].keywords["lr"]
        for recipe in (recipes.byol(1024, epochs=300), recipes.moco_v3(1024), recipes.simclr(1024))
    }
    assert rates == {1.2}
    assert recipes.simclr(512, base_lr=1.0)["optimizer"].keywords["lr"] == 2.0
    assert recipes.moco_v3(512, epochs=100)["optimizer"].keywords["lr"] == 1.2
    assert recipes.vicreg(512, epochs=100)["optimizer"].keywords["lr"] == 0.3 * 512 / 256
    assert recipes.moco_v3_linear_probing("vit")["optimizer"].keywords["lr"] == 3 * 1024 / 256
    assert recipes.mae_linear_probing(1024)["optimizer"].keywords["lr"] == 0.1 * 1024 / 256


def test_sizes_and_stages_have_the_numbers_of_the_source():
    rows = {name: (row.lr, row.weight_decay) for name, row in recipes.DEIT3.items()}
    assert rows == {"small": (4e-3, 0.05), "base": (3e-3, 0.05), "large": (3e-3, 0.05), "huge": (3e-3, 0.05)}
    for stage, lr in (("pretraining", 0.001), ("finetuning", 0.0003)):
        recipe = recipes.deit3_imagenet21k(stage, steps_per_epoch=10)
        settings, schedule = recipe["optimizer"].keywords, recipe["lr_scheduler"].keywords
        assert (settings["lr"], settings["weight_decay"], schedule["warmup_steps"]) == (lr, 0.02, 50)
        assert (schedule["start_factor"] * lr, schedule["end_factor"] * lr) == pytest.approx((1e-6, 1e-5))
    for model, lr, decay in (("base", 2e-3, 0.65), ("large", 4e-3, 0.75), ("huge", 4e-3, 0.75)):
        recipe = recipes.mae_finetuning(model)
        assert (recipe["optimizer"].keywords["lr"], recipe["layer_decay"]) == (lr, decay)


@pytest.mark.parametrize(("name", "epochs"), [("resnet_strikes_back_a1", 600), ("deit3_base", 800)])
def test_the_schedule_is_within_a_percent_of_that_of_timm(name, epochs):
    """Which changes it once an epoch, and counts the cosine from the first."""
    recipe, total_steps, (_, numbers), *_ = CASES[name]
    peak, end = numbers["lr"], recipe["lr_scheduler"].keywords.get("end_factor", 0.0) * numbers["lr"]
    optimizer, scheduler = built(recipe)
    scheduler.set_total_steps(total_steps)
    optimizer.step()
    for epoch in (5, 6, epochs // 3, epochs // 2, epochs - 1):
        scheduler.last_epoch = epoch * 625 - 1
        scheduler.step()
        expected = end + (peak - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=peak / 100)


def test_layers_of_mae_follow_its_schedule_at_their_scales():
    recipe, total_steps, _, rate, _ = CASES[FINE_TUNING]
    optimizer, scheduler = built(recipe)
    scheduler.set_total_steps(total_steps)
    optimizer.step()
    for step in (100, 6254, 70000, total_steps):
        scheduler.last_epoch = step - 2
        scheduler.step()
        expected = rate(step if step < 6255 else step - 1)
        for group in optimizer.param_groups:
            layer = int(group["name"].split(".")[0].removeprefix("layer_"))
            assert group["lr"] == pytest.approx(expected * 0.65 ** (3 - layer), rel=1e-9)


@pytest.mark.parametrize("name", ["vicreg", "resnet_strikes_back_a2", "deit3_base", "mae_linear_probing"])
def test_what_the_source_neither_adapts_nor_decays_is_excluded(name):
    """Vectors; by name, what a vision transformer lists, which timm neither decays nor adapts."""
    recipe = {key: value for key, value in CASES[name][0].items() if "exclude_" in key}
    model = ViT() if name == "deit3_base" else boring().net
    listed = model.no_weight_decay() if name == "deit3_base" else ()
    optimizer = build_optimizer(model, CASES[name][0]["optimizer"], **recipe)
    excluded = {
        name
        for group in optimizer.param_groups
        for name in group["param_names"]
        if not group["layer_adaptation"]
    }
    assert excluded == {name for name, p in model.named_parameters() if p.ndim <= 1 or name in listed}
    assert all((g["weight_decay"] == 0) >= (not g["layer_adaptation"]) for g in optimizer.param_groups)


def test_linear_probing_steps_as_the_lars_of_mae(tmp_path):
    """Its ``util/lars.py``, without decay; and the bias at the full rate is no reason to warn."""
    torch.manual_seed(0)
    recipe = recipes.mae_linear_probing()
    head = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)).double()
    theirs = [p.detach().clone() for p in head.parameters()]
    buffers = [torch.zeros_like(p) for p in theirs]
    optimizer = build_optimizer(head, recipe["optimizer"])
    features, labels = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), labels).backward()
        for p, w, mu in zip(head.parameters(), theirs, buffers, strict=True):
            g = p.grad.clone()
            if p.ndim > 1:
                g = g * (0.001 * w.norm() / g.norm())
            mu.mul_(0.9).add_(g)
            w.sub_(6.4 * mu)
        optimizer.step()
        for p, w in zip(head.parameters(), theirs, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)

    class Probe(Boring):
        def configure_model(self):
            self.net[:2].requires_grad_(False)

    for module, warns in ((Probe, False), (Boring, True)):
        own = trainer(
            tmp_path, max_steps=2, callbacks=[TrustRatioMonitor(alerts=True)], logger=CSVLogger(tmp_path)
        )
        with pytest.warns(UserWarning, match="LARS moves excluded") if warns else nullcontext():
            own.fit(module(**{**recipe, "lr_scheduler": None}))


def test_the_starting_points_follow_the_batch_size_and_norms_and_biases_do_not(tmp_path):
    for build in (recipes.lars, recipes.lamb):
        small, large = build(128), build(8192)
        for key in ("lr", "weight_decay"):
            assert large["optimizer"].keywords[key] == pytest.approx(8 * small["optimizer"].keywords[key])
        assert small["excluded_lr"] == large["excluded_lr"]
        module, own = boring(**build(64, warmup_steps=2)), trainer(tmp_path)
        before = [layer.weight.detach().clone() for layer in module.net]
        own.fit(module)
        after = [layer.weight for layer in module.net]
        assert not any(map(torch.equal, before, after))
        assert all(weight.isfinite().all() for weight in after)
        adapted, excluded = own.optimizers[0].param_groups
        assert excluded["initial_lr"] == small["excluded_lr"]
        assert not excluded["batch_size_scaling"]
        assert adapted["initial_lr"] == build(64)["optimizer"].keywords["lr"]
    with pytest.raises(ValueError, match=r"batch_size must be .* got 0"):
        recipes.lars(0)


@pytest.mark.parametrize("table", [recipes.MLPERF_RESNET50, recipes.MLPERF_BERT])
def test_every_row_of_mlperf_trains(table, tmp_path):
    build = recipes.mlperf_bert if table is recipes.MLPERF_BERT else recipes.mlperf_resnet50
    for batch_size in table:
        module = boring(**build(batch_size))
        before = module.net[0].weight.detach().clone()
        trainer(tmp_path, fast_dev_run=2).fit(module)
        assert not torch.equal(before, module.net[0].weight)


def test_adapting_norms_is_not_adapting_biases():
    module = boring(exclude_norm=False)
    assert module.configure_optimizers().param_groups[0]["param_names"] == [
        *("net.0.weight", "net.1.weight", "net.2.weight")
    ]
    with pytest.raises(ValueError, match="exclude_norm must be True or False, got 'no'"):
        boring(exclude_norm="no")
    assert isinstance(module.net[1], nn.BatchNorm1d)
