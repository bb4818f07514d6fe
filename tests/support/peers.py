"""The published optimizers for comparison, each installed once into ``.peers/``."""

import functools
import importlib
import subprocess
import sys
import tempfile
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

import pytest

PEERS = Path(__file__).parents[2] / ".peers"


def peer(requirement: str, module: str) -> ModuleType:
    """Return a module of a published package; skip the test where it cannot be had.

    Args:
        requirement: ``name==version``, as pip takes it. Nothing that it depends on is installed.
        module: Full name of the module. Of the packages above it only the folder is known: what their
            ``__init__`` would import (torchvision, compiled libraries) no optimizer needs.
    """
    folder = PEERS / requirement.replace("==", "-")
    failure = _install(requirement, folder)
    if failure is not None:
        pytest.skip(f"{requirement} cannot be installed: {failure}")
    parents = module.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        package = ModuleSpec(".".join(parents[:depth]), loader=None, is_package=True)
        package.submodule_search_locations = [str(folder.joinpath(*parents[:depth]))]
        sys.modules.setdefault(package.name, module_from_spec(package))
    try:
        imported = importlib.import_module(module)
    except Exception as error:
        pytest.skip(f"{requirement} cannot be imported: {error}")
    if not Path(imported.__file__).is_relative_to(folder):
        pytest.skip(f"{requirement} cannot be imported: {imported.__file__} has taken its name")
    return imported


@functools.cache
def _install(requirement: str, folder: Path) -> str | None:
    """Install what is not there yet; return the reason if that fails."""
    if folder.exists():
        return None
    PEERS.mkdir(exist_ok=True)
    # Filled under another name and then renamed: no process ever sees half of a package.
    with tempfile.TemporaryDirectory(dir=PEERS, prefix="unfinished-") as unfinished:
        target = Path(unfinished, "site")
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--retries=1", f"--target={target}"]
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, requirement],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if pip.returncode != 0:
            return (pip.stderr.strip() or f"pip ended with {pip.returncode}").splitlines()[-1]
        try:
            target.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    return None
