"""The benchmarks run; their measurements are not tested."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_phases, on_gpu
from benchmarks.gpu_report import read, report
from benchmarks.on_gpu import LIMITS

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
def test_the_time_of_a_step_is_printed_and_drawn_beside_baselines_and_peers(tmp_path):
    picture = tmp_path / "step_time.png"
    printed = run("benchmarks.step_time", "--shapes", "small-cnn", "--rounds", 3, "--picture", picture)
    table = rows(printed)
    for optimizer in ("SGD(fused=True)", "LARS", "AdamW(fused=True)", "LAMB"):
        median, _, ratio, _, moved, share = table[optimizer]
        assert float(median) > 0
        assert float(ratio) > 0
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
def test_the_cost_of_many_ranks_is_printed_and_drawn(tmp_path):
    picture = tmp_path / "ranks.png"
    options = ["--models", "GPT 0.1 B", "--ranks", 64, "--rounds", 1]
    printed = run("benchmarks.ranks", *options, "--picture", picture)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert [line[3] for line in lines] == ["FSDP2", "HSDP", "FSDP2 x TP"]
    assert [tuple(line[5:7]) for line in lines] == [("1", "800"), ("1", "800"), ("2", "1,584")]
    assert all(float(cell) > 0 for line in lines for cell in line[7:])
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.slow
def test_the_gain_of_hiding_the_exchange_of_norms_is_printed():
    printed = run("benchmarks.exchange", "--models", "ResNet-50", "--ranks", 2, "--rounds", 2)
    cells = [line.split("│")[2:-1] for line in printed.splitlines() if "ResNet-50" in line]
    assert [name.strip() for _, name, *_ in cells] == ["LARS", "LAMB"]
    for ranks, _, *times in cells:
        at_once, hidden, ratio, waiting, _, exchange, excluded = map(float, times)
        assert int(ranks) == 2
        assert ratio == pytest.approx(hidden / at_once, abs=0.01)
        assert at_once > waiting > 0
        assert exchange > 0
        assert excluded > 0


@pytest.mark.slow
def test_the_time_of_the_host_is_printed_beside_that_of_torchs_optimizers(monkeypatch):
    pytest.importorskip("triton", reason="there is no triton for this system")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    printed = run("benchmarks.host_time", "--layers", 4, "--rounds", 3)
    lines = [line.split("│")[1:-1] for line in printed.splitlines() if "│ LA" in line]
    launches = {line[1].strip(): int(line[2]) for line in lines}
    assert launches == {"LARS": 4, "LAMB": 5, "LARS8bit": 4, "LAMB8bit": 6}
    assert all(float(cell.replace(",", "")) > 0 for line in lines for cell in line[3:])


@pytest.mark.slow
def test_all_that_is_measured_on_a_gpu_can_be_tried_without_one(tmp_path):
    pytest.importorskip("triton", minversion="3.3", reason="there is no triton for this system")
    facts = tmp_path / "facts.jsonl"
    run("benchmarks.on_gpu", "--dry", "--out", facts)
    ends = {fact["phase"]: fact["code"] for fact in read(facts) if "code" in fact}
    assert ends == dict.fromkeys(LIMITS, 0)
    assert not [fact for fact in read(facts) if "error" in fact and "timm" not in fact["optimizer"]]
    printed = run("benchmarks.on_gpu", "--report", facts)
    for expected in ("CPU, Python", "| smallest | float32 | LAMB |", "`LAMB8bit()`", "compute-sanitizer"):
        assert expected in printed


def test_a_phase_of_the_session_on_a_gpu_costs_no_other(tmp_path, monkeypatch):
    facts = tmp_path / "facts.jsonl"
    monkeypatch.setitem(gpu_phases.PHASES, "canary", lambda say, dry: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setitem(gpu_phases.PHASES, "times", lambda say, dry: (say(began=True), time.sleep(60)))
    monkeypatch.setitem(gpu_phases.PHASES, "waits", lambda say, dry: say(known=True))
    monkeypatch.setitem(LIMITS, "times", 3)
    monkeypatch.setattr(on_gpu, "_SHORTEST", 0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    only = ["--only", "canary", "times", "waits"]
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--dry", "--out", str(facts), *only])
    assert on_gpu.main() == 1
    known = read(facts)
    assert [fact["code"] for fact in known if "code" in fact] == [-signal.SIGTERM, -signal.SIGKILL, 0]
    assert [fact for fact in known if "began" in fact or "known" in fact] == [
        {"phase": "times", "began": True},
        {"phase": "waits", "known": True},
    ]


def test_the_table_of_the_docs_matches_the_results():
    page = (ROOT / "docs/performance.md").read_text()
    commit = re.search(r"NVIDIA H100 .*, at commit (\w+);", page)[1]
    (results,) = (ROOT / "benchmarks/results").glob(f"*-h100-{commit}.jsonl")
    device, table, *_ = report(read(results)).split("\n\n")
    assert device in page
    assert table in page


@pytest.mark.slow
def test_the_session_on_a_gpu_says_that_there_is_none(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--out", str(tmp_path / "facts.jsonl")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "there is no GPU: --dry" in finished.stderr


@pytest.mark.slow
def test_the_overhead_of_callbacks_is_printed_beside_the_step():
    printed = run("benchmarks.callback_overhead", "--batch-size", 2, "--steps", 3)
    rows = [line.split("│") for line in printed.splitlines() if line.startswith("│")]
    callbacks = [row[1].strip().split(",")[0] for row in rows]
    monitored = ["TrustRatioMonitor"] * 2 + ["GradientNoiseScale"]
    assert callbacks == monitored + ["PercentileGradientClipping"] * 2
    assert all(float(row[2]) > 0 for row in rows)
