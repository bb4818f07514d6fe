"""The benchmarks run; what they measure is for those who run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_report import read, report

ROOT = Path(__file__).parents[1]

PNG = b"\x89PNG"


def run(*arguments):
    """Run a benchmark in a wide terminal and return what it prints."""
    finished = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "160"},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def rows(printed):
    """The cells of the tables, by what stands first in their row."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    return {row[0]: row[1:] for row in cells if row}


@pytest.mark.slow
def test_the_time_of_a_step_is_printed_and_drawn_beside_floor_and_peers(tmp_path):
    picture = tmp_path / "step_time.png"
    printed = run("benchmarks.step_time", "--shapes", "small-cnn", "--rounds", 3, "--picture", picture)
    table = rows(printed)
    for optimizer in ("SGD(fused=True)", "LARS", "AdamW(fused=True)", "LAMB"):
        median, _, of_floor, _, moved, share = table[optimizer]
        assert float(median) > 0
        assert float(of_floor) > 0
        assert int(moved) in (20, 28, 40)
        assert int(share.rstrip("%")) >= 0
    assert table["SGD(fused=True)"][2] == table["AdamW(fused=True)"][2] == "1.00"
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.slow
def test_the_growth_of_a_step_is_printed_and_drawn(tmp_path):
    picture = tmp_path / "growth.png"
    sizes = ["--most-parameters", 16, "--most-layers", 2]
    table = rows(run("benchmarks.growth", "--rounds", 2, *sizes, "--picture", picture))
    assert list(table) == ["16,384", "65,536", "1", "4"]
    assert all(float(time) > 0 for times in table.values() for time in times)
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.slow
def test_the_times_on_a_gpu_can_be_tried_without_one():
    pytest.importorskip("triton", reason="there is no triton for this system")
    without_gpu = ["--device", "cpu", "--only", "times", "--shapes", "small-cnn", "--rounds", 2]
    table = rows(run("benchmarks.on_gpu", *without_gpu))
    for step in ("LARS(fused=True)", "LARS(fused=True), in groups", "LAMB(fused=True)", "LAMB(fused=False)"):
        assert float(table[step][0]) > 0


def test_the_table_of_the_docs_is_what_the_results_say():
    (results,) = (ROOT / "benchmarks/results").glob("*-h100-*.jsonl")
    page = (ROOT / "docs/performance.md").read_text()
    device, table, _ = report(read(results)).split("\n\n")
    assert device in page
    assert table in page


@pytest.mark.slow
def test_the_checks_on_a_gpu_say_that_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.on_gpu"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "there is no GPU: --device cpu --only times" in finished.stderr


@pytest.mark.slow
def test_the_overhead_of_callbacks_is_printed_beside_the_step():
    printed = run("benchmarks.callback_overhead", "--batch-size", 2, "--steps", 3)
    rows = [line.split("│") for line in printed.splitlines() if line.startswith("│")]
    callbacks = [row[1].strip().split(",")[0] for row in rows]
    monitored = ["TrustRatioMonitor"] * 2 + ["GradientNoiseScale"]
    assert callbacks == monitored + ["PercentileGradientClipping"] * 2
    assert all(float(row[2]) > 0 for row in rows)
