"""The benchmarks run; what they measure is for those who run them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_time_of_a_step_is_printed_beside_its_floor():
    command = [sys.executable, "-m", "benchmarks.step_time", "--shapes", "small-cnn", "--rounds", "3"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    for optimizer in ("SGD(fused=True)", "LARS", "AdamW(fused=True)", "LAMB"):
        assert optimizer in finished.stdout


def test_the_overhead_of_the_monitor_is_printed_as_a_share_of_the_step():
    command = [sys.executable, "-m", "benchmarks.monitor_overhead", "--batch-size", "2", "--steps", "3"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    rows = [line.split("│") for line in finished.stdout.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["50", "1"]
    assert all(0 < float(row[4].strip(" %")) < 100 for row in rows)
