"""The entry points from YAML, as users run them: scripts, configurations, help."""

import copy
import csv
import os
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import lightning.pytorch.cli
import pytest
import pytorch_lightning.cli
import torch
import yaml
from torch import nn

import lightning_lars
from lightning_lars import LAMB, LARS, LargeBatchMixin, WarmupDecayLR
from lightning_lars.cli import LargeBatchCLI, PytorchLightningLargeBatchCLI
from tests.support.boring import Boring
from tests.support.releases import has
from tests.support.slow import slow_unless

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DOORS = [
    ("stock_cli.py", "mixin.yaml"),
    ("stock_cli.py", "callbacks.yaml"),
    ("large_batch_cli.py", "large_batch_cli.yaml"),
]
CONFIGS = [config for _, config in DOORS]


@pytest.fixture
def run_script(monkeypatch):
    """Runs a script of the examples without starting a process for it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(os, "environ", os.environ.copy())  # to which Lightning writes its seed

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")

    return run


@pytest.fixture
def printed(run_script, capsys):
    """What a script of the examples prints before it exits."""

    def printed_by(script, *arguments):
        with pytest.raises(SystemExit) as exit_:
            run_script(script, *arguments)
        output = capsys.readouterr()
        assert not exit_.value.code, output.err
        return output.out

    return printed_by


def metrics(tmp_path):
    (log,) = tmp_path.glob("lightning_logs/version_*/metrics.csv")
    with log.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("script", "config"), [slow_unless(door is DOORS[-1], *door) for door in DOORS], ids=CONFIGS
)
def test_each_entry_point_trains_from_its_yaml(tmp_path, monkeypatch, run_script, script, config):
    monkeypatch.chdir(tmp_path)
    csv_log = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=."]
    less = ["--trainer.max_epochs=6", "--trainer.enable_progress_bar=false"]
    run_script(script, "fit", "--config", EXAMPLES / config, *csv_log, *less)
    rows = metrics(tmp_path)
    optimizer = "LAMB" if config == "callbacks.yaml" else "LARS"
    rates = {
        group: [float(row[key]) for row in rows if row.get(key := f"lr-{optimizer}/{group}")]
        for group in ("adapted", "excluded")
    }
    assert len(set(rates["adapted"])) > 5
    assert max(rates["adapted"]) > 2 * rates["adapted"][0]
    assert any(row.get("trust_ratio_per_layer/net.0.weight") for row in rows)
    assert not any("trust_ratio_per_layer/net.1.weight" in row for row in rows)
    assert float([row["accuracy"] for row in rows if row["accuracy"]][-1]) > 0.9


@pytest.mark.slow
def test_a_door_trains_in_a_process_separate(tmp_path):
    command = [
        sys.executable,
        str(EXAMPLES / "stock_cli.py"),
        "fit",
        "--config",
        str(EXAMPLES / "mixin.yaml"),
    ]
    csv_log = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=."]
    result = subprocess.run([*command, *csv_log], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float([row["accuracy"] for row in metrics(tmp_path) if row["accuracy"]][-1]) > 0.95


@pytest.mark.parametrize(("script", "config"), DOORS, ids=CONFIGS)
def test_the_printed_configuration_is_read_back_as_itself(tmp_path, printed, script, config):
    first = printed(script, "fit", "--config", str(EXAMPLES / config), "--print_config")
    (tmp_path / "printed.yaml").write_text(first)
    again = printed(script, "fit", "--config", str(tmp_path / "printed.yaml"), "--print_config")
    assert yaml.safe_load(again) == yaml.safe_load(first)


CALLBACKS = [
    "BatchSizeScaling",
    "BatchSizeSchedule",
    "ExcludeNormAndBias",
    "LearningRateWarmup",
    "PercentileGradientClipping",
]
HELP = [
    *[("stock_cli.py", "trainer.callbacks", f"lightning_lars.{name}") for name in CALLBACKS],
    ("stock_cli.py", "model", "classifiers.MixinClassifier"),
    ("stock_cli.py", "optimizer", "lightning_lars.LARS"),
    ("stock_cli.py", "optimizer", "lightning_lars.LAMB"),
    ("stock_cli.py", "optimizer", "lightning_lars.LARS8bit"),
    ("stock_cli.py", "optimizer", "lightning_lars.LAMB8bit"),
    ("stock_cli.py", "optimizer", "lightning_lars.NovoGrad"),
    ("large_batch_cli.py", "optimizer", "lightning_lars.LARS"),
    ("large_batch_cli.py", "lr_scheduler", "lightning_lars.WarmupDecayLR"),
]


@pytest.mark.parametrize(("script", "key", "name"), HELP)
def test_every_argument_is_typed_and_described_in_the_help(printed, script, key, name):
    if name == "classifiers.MixinClassifier" and not has("jsonargparse>=4.48"):
        pytest.skip("jsonargparse before 4.48 leaves out what a mixin says of its arguments")
    text = printed(script, "fit", f"--{key}.help={name}")
    assert "ntyped" not in text
    arguments = re.split(rf"\n  (?=--{re.escape(key)}\.\w+)", text)[1:]
    assert arguments
    for argument in arguments:
        flag, *description = argument.split()
        assert re.search(r"type:\s", argument) or flag.endswith(".help"), argument
        assert len(" ".join(description).split("(type:")[0].split()) > 3, argument


def test_the_arguments_of_large_batch_cli_itself_are_described(printed):
    text = printed("large_batch_cli.py", "fit", "--help")
    for flag in ("lr_scheduler_interval", "param_groups.exclude", "param_groups.exclude_bias",
                 "param_groups.exclude_norm", "param_groups.exclude_gain", "param_groups.excluded_lr",
                 "param_groups.excluded_lr_scale"):  # fmt: skip
        assert re.search(rf"\n  --{flag}[ ,][^\n]*\n? +\w", text), flag


@pytest.mark.parametrize(
    ("cli_class", "groups"),
    [
        (lightning.pytorch.cli.LightningCLI, [None]),
        (LargeBatchCLI, ["adapted", "excluded"]),
        (pytorch_lightning.cli.LightningCLI, [None]),
        (PytorchLightningLargeBatchCLI, ["adapted", "excluded"]),
    ],
)
def test_the_stock_cli_loses_the_exclusion_and_ours_does_not(tmp_path, monkeypatch, cli_class, groups):
    """Why the CLI exists, for both packages."""
    monkeypatch.chdir(tmp_path)
    package = (
        pytorch_lightning if cli_class.__mro__[-2].__module__.startswith("pytorch_l") else lightning.pytorch
    )

    class Net(package.LightningModule):
        def __init__(self, width: int = 3):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))

        training_step = Boring.training_step
        train_dataloader = Boring.train_dataloader

    arguments = [
        "--optimizer=lightning_lars.LARS",
        "--optimizer.lr=1.0",
        "--trainer.fast_dev_run=2",
        "--seed_everything=0",
    ]
    arguments += ["--trainer.accelerator=cpu", "--trainer.callbacks+=lightning_lars.LearningRateWarmup"]
    arguments += ["--trainer.callbacks.warmup_steps=2", "--trainer.enable_progress_bar=false"]
    cli = cli_class(Net, args=arguments, run=False)
    before = cli.model.net[0].weight.detach().clone()
    cli.trainer.fit(cli.model)
    assert [group.get("name") for group in cli.trainer.optimizers[0].param_groups] == groups
    assert not torch.equal(before, cli.model.net[0].weight)


class Plain(lightning.pytorch.LightningModule):
    """Says nothing of its optimizer."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.net = nn.Linear(4, width)

    training_step = Boring.training_step
    train_dataloader = Boring.train_dataloader


QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--seed_everything=0"]


@pytest.fixture
def _alone(monkeypatch):
    """The CLI warns of arguments that are given beside those of the process."""
    monkeypatch.setattr(sys, "argv", ["script.py"])


@pytest.mark.usefixtures("_alone")
def test_a_model_of_the_cli_takes_its_optimizer_to_other_processes():
    """As those of ddp_spawn."""
    cli = LargeBatchCLI(Plain, args=["--optimizer=lightning_lars.LAMB", *QUIET], run=False)
    optimizer = copy.deepcopy(cli.model).configure_optimizers()
    assert [group["name"] for group in optimizer.param_groups] == ["adapted", "excluded"]
    assert optimizer.param_groups[0]["lr"] == 1e-3
    sent = pickle.loads(pickle.dumps(cli.model))
    assert sent.configure_optimizers().param_groups[0]["params"][0] is sent.net.weight


class Gated(Plain):
    """Has a parameter for each rule."""

    def __init__(self, width: int = 3):
        super().__init__(width)
        self.gate = nn.Parameter(torch.ones(width))
        self.norm = nn.LayerNorm(width)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    ("argument", "adapted"),
    [
        ("exclude=[]", ["net.weight"]),
        ("exclude=[net.weight]", []),
        ("exclude_norm=false", ["net.weight", "norm.weight"]),
        ("exclude_bias=false", ["net.weight", "net.bias"]),
        ("exclude_gain=false", ["gate", "net.weight"]),
    ],
)
def test_the_command_line_adds_exclusions_and_switches_defaults_off(argument, adapted):
    arguments = ["--optimizer=lightning_lars.LAMB", f"--param_groups.{argument}", *QUIET]
    cli = LargeBatchCLI(Gated, args=arguments, run=False)
    groups = cli.model.configure_optimizers().param_groups
    assert [group["param_names"] for group in groups if group["name"] == "adapted"] == (
        [adapted] if adapted else []
    )


@pytest.mark.usefixtures("_alone")
def test_a_subclass_chooses_the_classes_of_optimizer_and_scheduler(tmp_path):
    class OwnCLI(LargeBatchCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_optimizer_args(LARS)
            parser.add_lr_scheduler_args(WarmupDecayLR)

    arguments = ["--optimizer.lr=0.5", "--lr_scheduler.warmup_steps=1", "--trainer.fast_dev_run=2", *QUIET]
    cli = OwnCLI(Plain, args=arguments, run=False)
    cli.trainer.fit(cli.model)
    assert type(cli.trainer.optimizers[0]) is LARS
    assert cli.trainer.lr_scheduler_configs[0].scheduler.base_lrs == [0.5, 0.5]


def test_a_subclass_that_overrides_configure_optimizers_raises():
    with pytest.raises(
        TypeError, match="Own must not override configure_optimizers, which takes an optimizer"
    ):
        type("Own", (LargeBatchCLI,), {"configure_optimizers": staticmethod(lambda *_: None)})


@pytest.mark.usefixtures("_alone")
def test_a_scheduler_without_an_optimizer_says_so():
    arguments = ["--lr_scheduler=torch.optim.lr_scheduler.StepLR", "--lr_scheduler.step_size=1", *QUIET]
    with pytest.warns(UserWarning, match="--lr_scheduler has no effect without --optimizer"):
        LargeBatchCLI(Plain, args=arguments, run=False)


class Configured(Plain):
    """Builds an optimizer of its own."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mixed(LargeBatchMixin, Plain):
    """Takes an optimizer as an argument."""


class MixedForOther(LargeBatchMixin, pytorch_lightning.LightningModule):
    """The same of the other package."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net = nn.Linear(4, 3)


class Inherits(Configured):
    """Inherits an optimizer of its own."""


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    ("cli_class", "model", "said"),
    [
        (LargeBatchCLI, Configured, "which builds --optimizer: use only"),
        (LargeBatchCLI, Inherits, "which builds --optimizer: use only"),
        (LargeBatchCLI, Mixed, "--optimizer, and the arguments of LargeBatchMixin have no effect: use only"),
        (
            PytorchLightningLargeBatchCLI,
            MixedForOther,
            "--optimizer, and the arguments of LargeBatchMixin have no effect: use only",
        ),
    ],
)
def test_an_optimizer_that_overrides_the_model_raises_a_warning(cli_class, model, said):
    """In the words of the stock CLI, which does so too."""
    arguments = ["--optimizer=lightning_lars.LAMB", *QUIET]
    stock = f"`{model.__name__}.configure_optimizers` will be overridden by `{cli_class.__name__}"
    with pytest.warns(UserWarning, match=re.escape(stock)) as caught:
        cli = cli_class(model, args=arguments, run=False)
    assert any(said in str(each.message) for each in caught)
    assert type(cli.model.configure_optimizers()) is LAMB


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("model", [Configured, Mixed])
def test_the_optimizer_of_the_model_alone_is_kept(model):
    """Warnings are errors."""
    cli = LargeBatchCLI(model, args=QUIET, run=False)
    assert type(cli.model.configure_optimizers()) is (LARS if model is Mixed else torch.optim.SGD)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(("name", "defaults"), [("lightning_lars.LAMB", LAMB), ("AdamW", torch.optim.AdamW)])
def test_another_optimizer_has_its_own_defaults(monkeypatch, name, defaults):
    """Not those that it shares with the default optimizer of the mixin."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from classifiers import MixinClassifier

    model = lightning.pytorch.cli.LightningCLI(
        MixinClassifier,
        args=[f"--model.optimizer={name}", *QUIET],
        run=False,
        auto_configure_optimizers=False,
    ).model
    expected = defaults([nn.Parameter(torch.ones(1))]).param_groups[0]
    adapted = model.configure_optimizers().param_groups[0]
    for key in ("lr", "betas", "eps", "weight_decay"):
        assert adapted[key] == pytest.approx(expected[key]), key


def test_a_saved_configuration_runs_again(tmp_path, run_script, monkeypatch):
    """What the stock CLI saves of the mixin."""
    monkeypatch.chdir(tmp_path)
    short = [
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=25",
        "--trainer.enable_checkpointing=false",
    ]
    short += ["--model.lr_scheduler.warmup_steps=2"]
    for config in (EXAMPLES / "mixin.yaml", tmp_path / "lightning_logs/version_0/config.yaml"):
        run_script("stock_cli.py", "fit", "--config", config, *short)
    assert "nable to serialize" not in config.read_text()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    "package", [lightning.pytorch, pytorch_lightning], ids=lambda package: package.__name__
)
def test_every_callback_works_in_the_trainer_and_the_cli_of_both_packages(tmp_path, monkeypatch, package):
    monkeypatch.chdir(tmp_path)

    class Net(package.LightningModule):
        def __init__(self, width: int = 3):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))

        def forward(self, batch):
            return self.net(batch)

        training_step = Boring.training_step
        train_dataloader = Boring.train_dataloader

    arguments = ["--optimizer=lightning_lars.LARS", "--optimizer.lr=0.5", "--seed_everything=0"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.max_steps=4", "--trainer.log_every_n_steps=1"]
    arguments += [
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=.",
        "--trainer.enable_progress_bar=false",
    ]
    for callback in lightning_lars.callbacks.__all__:
        arguments.append(f"--trainer.callbacks+=lightning_lars.{callback}")
        if callback == "BatchSizeScaling":
            arguments.append("--trainer.callbacks.base_batch_size=4")
        if callback == "BatchSizeSchedule":
            arguments.append("--trainer.callbacks.batch_sizes={0: 8}")
        if callback == "LearningRateWarmup":
            arguments.append("--trainer.callbacks.warmup_steps=2")
        if callback == "TrustRatioMonitor":
            arguments.append("--trainer.callbacks.layers=net.*")
    arguments.append(f"--trainer.callbacks+={package.__name__}.callbacks.LearningRateMonitor")
    arguments.append("--trainer.callbacks.logging_interval=step")
    cli = package.cli.LightningCLI(Net, args=arguments, run=False)
    cli.trainer.fit(cli.model)
    rows = metrics(tmp_path)
    # LearningRateMonitor logs every batch that is accumulated.
    rates = [float(row["lr-LARS/excluded"]) for row in rows if row["lr-LARS/excluded"]]
    assert rates == [0.5] * 2 + [1.0] * 6
    assert len([row for row in rows if row["trust_ratio_per_layer/net.0.weight"]]) == 4
