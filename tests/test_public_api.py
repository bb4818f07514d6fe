"""The public names, and the dependencies between folders."""

import ast
import importlib
import importlib.metadata
import inspect
import pickle
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import lightning_lars

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_lars"
TOPICS = {"batch_norm", "combined", "gradients", "groups", "learning_rate", "trust_ratios"}
GROUND = {"class_names", "rules", "sharding", "printing"}
ARROWS = {
    "advice": {"callbacks", "recipes", "trainer", "optim", *TOPICS, *GROUND},
    "cli": {"advice", "trainer", "groups"},
    "combined": {"optim"},
    "mixin": {"trainer", "groups", "optim", "rules"},
    "recipes": {"learning_rate", "optim", "rules"},
    "callbacks": {"trainer", "optim", "run_report", *TOPICS, *GROUND},
    "trainer": {"class_names", "combined", "gradients", "groups", "learning_rate", "optim", "rules"},
    "run_report": set(),
    "trust_ratios": {"gradients", "optim", *GROUND},
    "gradients": {"sharding"},
    "batch_norm": {"sharding"},
    "groups": {"class_names", "combined", "rules"},
    "learning_rate": {"rules"},
    "optim": {"sharding", "rules"},
    "sharding": set(),
    "printing": set(),
    "rules": set(),
    "class_names": set(),
}
"""What each folder, or module at the top, may import of the package."""
OLD_PATHS = {
    "lightning_lars.batch_size": [
        "lightning_lars.learning_rate.batch_scaling",
        "lightning_lars.trainer.batch_size",
    ],
    "lightning_lars.schedules": ["lightning_lars.learning_rate"],
    "lightning_lars.param_groups": [
        "lightning_lars.groups.build",
        "lightning_lars.groups.explanation",
        "lightning_lars.groups.param_groups",
        "lightning_lars.groups.stale_parameters",
    ],
}


def imports(path):
    """Every module that a file imports, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


IMPORTS_LITTLE = """
import sys
from lightning_lars import LARS, LAMB8bit
import lightning_lars.optim
above = {"lightning", "pytorch_lightning", "torchmetrics", "rich", "lightning_utilities", "jsonargparse"}
assert not above & set(sys.modules), above & set(sys.modules)
assert lightning_lars.optim.LARS is LARS
assert "TrustRatioMonitor" in dir(lightning_lars) and "lightning_lars.callbacks" not in sys.modules
import lightning.pytorch, torch.serialization
from lightning_utilities.core import rank_zero
log = rank_zero.log
assert lightning_lars.callbacks.TrustRatioMonitor is lightning_lars.TrustRatioMonitor
assert lightning_lars.mixin.LargeBatchMixin is lightning_lars.LargeBatchMixin
names = {}
exec("from lightning_lars import *", names)
assert set(lightning_lars.__all__) <= set(names)
import lightning_lars.cli, lightning_lars.recipes
assert not any("lightning_lars" in each.__module__ for each in torch.serialization.get_safe_globals())
assert rank_zero.log is log and log.name.startswith("lightning.")  # what silences Lightning goes on to
"""


@pytest.mark.timeout(300)  # a first import also compiles, which takes minutes on a busy machine
def test_the_optimizers_are_imported_with_torch_alone_and_the_rest_when_it_is_asked_for():
    run = subprocess.run([sys.executable, "-c", IMPORTS_LITTLE], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr


def test_type_checkers_know_every_public_name():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.name for node in block.body for alias in node.names}
    assert told == set(lightning_lars.__all__)


@pytest.mark.parametrize("name", [*lightning_lars.__all__, "__version__"])
def test_every_public_name_is_there(name):
    assert getattr(lightning_lars, name) is not None
    assert name in dir(lightning_lars)


def test_a_missing_name_raises_as_in_any_module():
    with pytest.raises(AttributeError, match="module 'lightning_lars' has no attribute 'LARC'"):
        lightning_lars.LARC  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'LARC'"):
        from lightning_lars import LARC  # noqa: F401


def test_a_tree_that_was_copied_and_not_installed_imports(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    vars(lightning_lars).pop("__version__", None)
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert lightning_lars.__version__ == "0+unknown"
    monkeypatch.undo()
    del lightning_lars.__version__
    assert lightning_lars.__version__ == importlib.metadata.version("lightning-lars")


@pytest.fixture
def _as_at_first():
    """Forget the old paths after a test, so that the next one imports them anew."""
    yield
    for name in set(OLD_PATHS) & set(sys.modules):
        del sys.modules[name]
    lightning_lars.param_groups = lightning_lars.groups.param_groups.param_groups


@pytest.mark.usefixtures("_as_at_first")
@pytest.mark.parametrize(("old", "new"), OLD_PATHS.items(), ids=OLD_PATHS)
def test_old_module_paths_still_work_with_a_deprecation_warning(old, new):
    with pytest.warns(
        DeprecationWarning, match=f"{old} is deprecated.*: import .*from lightning_lars"
    ) as caught:
        module = importlib.import_module(old)
    assert len(caught) == 1
    assert caught[0].filename == importlib.__file__
    held = {name: value for path in new for name, value in vars(importlib.import_module(path)).items()}
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is held[name]


@pytest.mark.usefixtures("_as_at_first")
def test_a_module_named_like_a_function_is_callable_as_the_function():
    with pytest.warns(DeprecationWarning, match="lightning_lars.param_groups is deprecated"):
        import lightning_lars.param_groups as module
    function = lightning_lars.groups.param_groups.param_groups
    assert inspect.ismodule(module)
    assert module.param_groups is function
    net = torch.nn.Linear(2, 2)
    assert [group["name"] for group in module(net, exclude=("weight",))] == ["excluded"]
    assert [group["name"] for group in lightning_lars.param_groups(net)] == ["adapted", "excluded"]
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize("name", [n for n in lightning_lars.__all__ if callable(getattr(lightning_lars, n))])
def test_every_public_name_has_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(lightning_lars, name))


@pytest.mark.parametrize(
    ("path", "refused"),
    [
        ("optim/lars.py", 1),
        ("groups/param_groups.py", 1),
        ("mixin.py", 0),
        ("callbacks/a.py", 0),
        ("advice/advise.py", 0),
        ("advice/short_run.py", 0),
        ("advice/table.py", 1),
    ],
)
def test_the_linter_refuses_lightning_in_torch_only_modules(path, refused):
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
def test_callbacks_import_neither_each_other_nor_the_entry_points(path):
    public = {getattr(lightning_lars.callbacks, name).__module__
              for name in lightning_lars.callbacks.__all__}  # fmt: skip
    doors = {"lightning_lars.callbacks", "lightning_lars.mixin", "lightning_lars.cli", "lightning_lars"}
    assert not (public | doors) & set(imports(path))


def test_lars_and_lamb_do_not_know_each_other():
    assert "lightning_lars.optim.lamb" not in imports(PACKAGE / "optim/lars.py")
    assert "lightning_lars.optim.lars" not in imports(PACKAGE / "optim/lamb.py")


def room(module):
    """The folder at the top of the package, or the module there, that a dotted name is in."""
    return module.removeprefix("lightning_lars").lstrip(".").split(".")[0] or "__init__"


@pytest.mark.parametrize("below", ARROWS)
def test_arrows_between_folders_point_one_way(below):
    paths = [PACKAGE / f"{below}.py", *PACKAGE.glob(f"{below}/**/*.py")]
    files = [path for path in paths if path.exists()]
    assert files
    for path in files:
        to = {room(name) for name in imports(path) if name.split(".")[0] == "lightning_lars"} - {below}
        assert to <= ARROWS[below], path


def test_modules_import_each_other_in_no_circle():
    files = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    arrows = {name.removesuffix(".__init__"): set(imports(path)) for path, name in files.items()}
    list(TopologicalSorter(arrows).static_order())  # raises CycleError, which names the circle


def test_every_folder_and_module_has_its_arrows():
    shims = {name.removeprefix("lightning_lars.") for name in OLD_PATHS}
    rooms = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert {name for name in rooms if not name.startswith("__")} - shims == set(ARROWS)


@pytest.mark.parametrize("folder", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_every_folder_describes_its_contents(folder):
    assert len(ast.get_docstring(ast.parse(folder.read_text()))) > 40
