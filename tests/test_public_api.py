"""The public names, and the arrows between the rooms."""

import ast
import importlib.metadata
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_lars

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_lars"


def imports(path):
    """Every module that a file imports, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_all_holds_the_public_names():
    public = {
        name
        for name, value in vars(lightning_lars).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert sorted(public) == sorted(lightning_lars.__all__)


def test_a_tree_that_was_copied_and_not_installed_imports(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    try:
        assert importlib.reload(lightning_lars).__version__ == "0+unknown"
    finally:
        monkeypatch.undo()
        importlib.reload(lightning_lars)
    assert lightning_lars.__version__ == importlib.metadata.version("lightning-lars")


def test_the_function_that_has_the_name_of_its_module_leads_to_the_module():
    import lightning_lars.param_groups as imported
    from lightning_lars import param_groups

    net = torch.nn.Linear(2, 2)
    assert imported is param_groups is lightning_lars.param_groups
    for name in ("param_groups", "build_optimizer", "explain_param_groups"):
        assert getattr(imported, name) is getattr(lightning_lars, name)
        assert getattr(sys.modules["lightning_lars.param_groups"], name) is getattr(lightning_lars, name)
    assert [group["name"] for group in imported(net)] == ["adapted", "excluded"]
    assert pickle.loads(pickle.dumps(imported)) is param_groups


@pytest.mark.parametrize("name", [n for n in lightning_lars.__all__ if callable(getattr(lightning_lars, n))])
def test_every_public_name_has_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(lightning_lars, name))


@pytest.mark.parametrize(
    ("path", "refused"),
    [("optim/lars.py", 1), ("param_groups.py", 1), ("mixin.py", 0), ("callbacks/a.py", 0)],
)
def test_the_linter_refuses_lightning_below_the_doors(path, refused):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--select=TID251",
            "--stdin-filename",
            str(PACKAGE / path),
            "-",
        ],
        input="import lightning.pytorch\n\nprint(lightning.pytorch)\n",
        text=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert run.returncode == refused, run.stdout + run.stderr


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("callbacks/[!_]*.py")), ids=lambda path: path.stem)
def test_callbacks_know_neither_each_other_nor_the_doors(path):
    public = {getattr(lightning_lars.callbacks, name).__module__
              for name in lightning_lars.callbacks.__all__}  # fmt: skip
    doors = {"lightning_lars.callbacks", "lightning_lars.mixin", "lightning_lars.cli", "lightning_lars"}
    assert not (public | doors) & set(imports(path))


def test_lars_and_lamb_do_not_know_each_other():
    assert "lightning_lars.optim.lamb" not in imports(PACKAGE / "optim/lars.py")
    assert "lightning_lars.optim.lars" not in imports(PACKAGE / "optim/lamb.py")


def test_the_optimizers_know_nothing_above_them():
    for path in PACKAGE.glob("optim/**/*.py"):
        ours = [name for name in imports(path) if name.startswith("lightning")]
        below = ("lightning_lars.optim", "lightning_lars.sharding", "lightning_lars.rules")
        assert all(name.startswith(below) for name in ours), path
