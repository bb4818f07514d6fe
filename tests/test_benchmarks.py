"""The benchmarks run; what they measure is for those who run them."""

import os
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


def test_the_overhead_of_callbacks_is_printed_beside_the_step():
    command = [sys.executable, "-m", "benchmarks.callback_overhead", "--batch-size", "2", "--steps", "3"]
    finished = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"}
    )
    assert finished.returncode == 0, finished.stderr
    rows = [line.split("│") for line in finished.stdout.splitlines() if line.startswith("│")]
    callbacks = [row[1].strip().split(",")[0] for row in rows]
    monitored = ["TrustRatioMonitor"] * 2 + ["GradientNoiseScale"]
    assert callbacks == monitored + ["PercentileGradientClipping"] * 2
    assert all(float(row[2]) > 0 for row in rows)
