"""The doors from YAML, as a user opens them: scripts, configurations, help."""

import csv
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

from lightning_lars.cli import LargeBatchCLI, PytorchLightningLargeBatchCLI
from tests.boring import Boring

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DOORS = [
    ("stock_cli.py", "mixin.yaml"),
    ("stock_cli.py", "callbacks.yaml"),
    ("large_batch_cli.py", "large_batch_cli.yaml"),
]


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a script of the examples prints before it exits, without starting a process for it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def printed_by(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        output = capsys.readouterr()
        assert not exit_.value.code, output.err
        return output.out

    return printed_by


def metrics(tmp_path):
    (log,) = tmp_path.glob("lightning_logs/version_*/metrics.csv")
    with log.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("script", "config"), DOORS, ids=[config for _, config in DOORS])
def test_each_door_trains_from_its_yaml(tmp_path, script, config):
    command = [sys.executable, str(EXAMPLES / script), "fit", "--config", str(EXAMPLES / config)]
    csv_log = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=."]
    result = subprocess.run([*command, *csv_log], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = metrics(tmp_path)
    optimizer = "LAMB" if config == "callbacks.yaml" else "LARS"
    rates = {
        group: [float(row[key]) for row in rows if row.get(key := f"lr-{optimizer}/{group}")]
        for group in ("adapted", "excluded")
    }
    assert len(set(rates["adapted"])) > 5
    assert max(rates["adapted"]) > 2 * rates["adapted"][0]
    assert any(row.get("trust_ratio/net.0.weight") for row in rows)
    assert not any("trust_ratio/net.1.weight" in row for row in rows)
    assert float([row["accuracy"] for row in rows if row["accuracy"]][-1]) > 0.95


@pytest.mark.parametrize(("script", "config"), DOORS, ids=[config for _, config in DOORS])
def test_the_printed_configuration_is_read_back_as_itself(tmp_path, printed, script, config):
    first = printed(script, "fit", "--config", str(EXAMPLES / config), "--print_config")
    (tmp_path / "printed.yaml").write_text(first)
    again = printed(script, "fit", "--config", str(tmp_path / "printed.yaml"), "--print_config")
    assert yaml.safe_load(again) == yaml.safe_load(first)


CALLBACKS = ["BatchSizeScaling", "ExcludeNormAndBias", "LearningRateWarmup"]
HELP = [
    *[("stock_cli.py", "trainer.callbacks", f"lightning_lars.{name}") for name in CALLBACKS],
    ("stock_cli.py", "model", "classifiers.MixinClassifier"),
    ("stock_cli.py", "optimizer", "lightning_lars.LARS"),
    ("stock_cli.py", "optimizer", "lightning_lars.LAMB"),
    ("large_batch_cli.py", "optimizer", "lightning_lars.LARS"),
    ("large_batch_cli.py", "lr_scheduler", "lightning_lars.WarmupDecayLR"),
]


@pytest.mark.parametrize(("script", "key", "name"), HELP)
def test_every_argument_is_typed_and_described_in_the_help(printed, script, key, name):
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
