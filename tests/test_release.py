"""The wheel built from the sdist works in a fresh environment."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import lightning_lars

ROOT = Path(__file__).parents[1]

# One worker builds, and all wait for pip.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

USE = """
from importlib.metadata import version
from pathlib import Path
import sys

import torch

import lightning_lars

assert Path(lightning_lars.__file__).is_relative_to(sys.prefix), lightning_lars.__file__
assert lightning_lars.__version__ == version("lightning-lars")
net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
optimizer = lightning_lars.build_optimizer(net, lightning_lars.LARS, lr=1.0)
for _ in range(3):
    optimizer.zero_grad()
    net(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
print(sorted(optimizer.trust_ratios()))
"""


def run(*command, cwd):
    finished = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of an environment in which the wheel is installed, beside what it depends on."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-I", "-m", "pip", "install", "--no-deps", "--no-index", built[1], cwd=folder)
    # What it depends on is taken from here, but not the repository: its own .pth file is not read again.
    (site,) = folder.glob("lib/python*/site-packages")
    site.joinpath("dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return python


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = zipfile.ZipFile(built[1]).namelist()
    assert "lightning_lars/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_lars"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_lars").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_the_sdist_holds_tests_docs_and_examples(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "tests/conftest.py"} <= names
    assert {"examples/train.py", "docs/compatibility.md", "benchmarks/step_time.py"} <= names
    assert not [name for name in names if name.startswith((".venv", ".peers", ".ci"))]


def test_the_metadata_is_complete(built):
    wheel = zipfile.ZipFile(built[1])
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Version"] == lightning_lars.__version__
    for field in ("Summary", "Author", "License-Expression", "License-File", "Requires-Python", "Keywords"):
        assert metadata[field], field
    assert metadata["Description-Content-Type"] == "text/markdown"
    # A package index has none of the files beside the README.
    targets = re.findall(r"\]\(([^)]*)", metadata.get_payload())
    assert {target.partition(":")[0] for target in targets if not target.startswith("#")} == {"https"}
    assert set(metadata.get_all("Provides-Extra")) == {"8bit", "cli", "docs", "examples", "plot", "test"}
    assert f"## [{metadata['Version']}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {metadata['Version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_step_in_the_new_environment(installed, tmp_path):
    assert run(installed, "-I", "-W", "error", "-c", USE, cwd=tmp_path) == "['0.weight']\n"


def test_the_command_line_in_the_new_environment(installed, tmp_path):
    command = "from lightning_lars.cli import LargeBatchCLI; LargeBatchCLI()"
    printed = run(installed, "-I", "-c", command, "fit", "--help", cwd=tmp_path)
    assert "--optimizer" in printed
