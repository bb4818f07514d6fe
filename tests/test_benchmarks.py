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
