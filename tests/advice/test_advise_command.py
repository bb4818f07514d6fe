"""The subcommand ``advise``, in the process of the tests."""

import json
import os
import runpy
import sys

import lightning.pytorch
import pytest
import pytorch_lightning
import torch

from lightning_lars.advice.report import Advice
from lightning_lars.cli import LargeBatchCLI, PytorchLightningLargeBatchCLI
from tests.support.boring import Plain

pytestmark = pytest.mark.filterwarnings("ignore:No seed found")

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 3,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
OPTIMIZER = ["--optimizer=lightning_lars.LARS", "--optimizer.lr=2", "--param_groups.excluded_lr=0.05"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # to which Lightning writes its seed


def test_the_command_prints_tables_and_writes_json(tmp_path, capsys):
    path = tmp_path / "new/folder/advice.json"
    arguments = ["advise", *OPTIMIZER, "--max_steps=4", f"--json={path}"]
    cli = LargeBatchCLI(Plain, trainer_defaults=QUIET, args=arguments)
    advice = Advice.from_json(path.read_text())
    assert (advice.optimizer, advice.batch_size, advice.measured_steps, advice.steps) == ("LARS", 4, 4, 24)
    assert [(group.name, group.lr) for group in advice.groups] == [("adapted", 2.0), ("excluded", 0.05)]
    printed = capsys.readouterr().out
    assert "Parameter groups of LARS" in printed
    assert "Not known:" in printed
    assert os.listdir(tmp_path) == ["new"]
    assert os.listdir(path.parent) == ["advice.json"]
    assert cli.trainer.global_step == 0


def test_the_command_prints_the_tables_before_a_file_that_cannot_be_written(tmp_path, capsys):
    arguments = ["advise", *OPTIMIZER, "--max_steps=0", f"--json={tmp_path}"]
    with pytest.raises(IsADirectoryError):
        LargeBatchCLI(Plain, trainer_defaults=QUIET, args=arguments)
    assert "Parameter groups of LARS" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_prints_json_alone_if_asked(capsys):
    cli = LargeBatchCLI(
        Plain, trainer_defaults=QUIET, args=["advise", *OPTIMIZER, "--max_steps=0", "--json=-"]
    )
    assert json.loads(capsys.readouterr().out)["measured_steps"] == 0
    assert isinstance(cli.model, Plain)


@pytest.mark.slow
def test_the_command_takes_the_configuration_that_fit_has_saved(tmp_path, capsys):
    LargeBatchCLI(Plain, trainer_defaults=QUIET, args=["fit", *OPTIMIZER, "--trainer.max_steps=2"])
    [config] = tmp_path.glob("lightning_logs/version_0/config.yaml")
    LargeBatchCLI(Plain, trainer_defaults=QUIET, args=["advise", f"--config={config}", "--json=-"])
    advice = Advice.from_json(capsys.readouterr().out)
    assert (advice.measured_steps, advice.steps) == (2, 2)


@pytest.mark.slow
def test_the_cli_of_pytorch_lightning_has_it_too(capsys):

    arguments = ["advise", "--optimizer=Adam", "--max_steps=2", "--json=-"]

    class Model(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            return self.net(batch).pow(2).mean()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.ones(32, 4), batch_size=4)

    PytorchLightningLargeBatchCLI(Model, trainer_defaults=QUIET, args=arguments)
    assert Advice.from_json(capsys.readouterr().out).optimizer == "Adam"


@pytest.mark.slow
def test_a_subcommand_of_that_name_that_the_user_has_stays_theirs():
    told = []

    class Own(lightning.pytorch.Trainer):
        def advise(self, model, words: int = 1):
            """Give the user's own advice."""
            told.append(words)

    class OwnCLI(LargeBatchCLI):
        @staticmethod
        def subcommands():
            return {**LargeBatchCLI.subcommands(), "advise": {"model"}}

    OwnCLI(Plain, trainer_class=Own, trainer_defaults=QUIET, args=["advise", "--words=3"])
    assert told == [3]


@pytest.mark.slow
def test_the_package_is_a_command_for_any_module(monkeypatch, capsys):
    trainer = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    model = "--model=tests.support.boring.Boring"
    monkeypatch.setattr(
        sys, "argv", ["lightning_lars", "advise", model, *trainer, "--max_steps=2", "--json=-"]
    )
    runpy.run_module("lightning_lars", run_name="__main__")
    advice = Advice.from_json(capsys.readouterr().out)
    assert (advice.optimizer, advice.measured_steps) == ("LARS", 2)
