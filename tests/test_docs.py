"""Runs the code of the documentation."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.slow import slow_unless

pytestmark = pytest.mark.timeout(180)  # some pages train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize(
    "page",
    [slow_unless(page.name != "small_to_large_batch.md", page) for page in PAGES],
    ids=lambda page: page.name,
)
@pytest.mark.filterwarnings("default")
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, page.name, "exec"), namespace)


def test_every_link_to_a_file_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_notebooks_are_committed_without_outputs():
    notebooks = sorted(ROOT.glob("docs/notebooks/*.ipynb"))
    assert notebooks
    for path in notebooks:
        cells = json.loads(path.read_text())["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name


def test_ci_runs_the_test_command_of_the_readme():
    commands = [
        line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith("-m pytest -n auto")
    ]
    assert len(commands) == 1
    assert "grep -m 1 -- '-m pytest -n auto$' README.md" in (ROOT / ".ci/run").read_text()


@pytest.mark.slow
def test_the_plot_of_the_schedules_is_drawn_by_its_script(tmp_path):
    script = shutil.copy(ROOT / "docs/plot_schedules.py", tmp_path)
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    drawn, shown = (folder.joinpath("schedules.png").read_bytes() for folder in (tmp_path, ROOT / "docs"))
    assert drawn[:24] == shown[:24]  # a PNG of the same size


@pytest.mark.slow
def test_the_plots_of_trust_ratios_are_drawn_by_their_script(tmp_path):
    cases = ["healthy", "learning_rate_of_sgd", "learning_rate_too_large"]
    script = [sys.executable, ROOT / "docs/plot_trust_ratios.py", "--dataset", "digits", "--epochs", "2"]
    finished = subprocess.run(
        [*script, "--folder", tmp_path], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert finished.stdout.count("Test accuracy") == 3
    printed = " ".join(finished.stdout.split())
    assert "LARS needs a larger learning rate than SGD" in printed
    assert printed.count("LARS moves excluded parameters") == 2
    for case in cases:
        drawn, shown = (
            folder.joinpath(f"trust_ratios_{case}.png").read_bytes() for folder in (tmp_path, ROOT / "docs")
        )
        assert drawn[:8] == shown[:8] == b"\x89PNG\r\n\x1a\n"


def test_every_row_of_the_page_on_checkpoints_names_tests_that_exist():
    lines = (ROOT / "docs" / "checkpoints.md").read_text().splitlines()
    rows = [line for line in lines if re.match(r"\| (?!Saved|Optimizer)", line)]
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= defined, row
