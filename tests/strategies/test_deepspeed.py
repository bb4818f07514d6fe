"""DeepSpeed: stage 0 matches one device, stages 1 to 3 are refused at the first step."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def seen():
    """What came of each stage."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.workers.deepspeed_zero", port],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_stage_0_matches_one_device(seen):
    assert seen["0"] < 1e-6


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_flat_layers_are_refused(seen, stage):
    assert "is not a layer that the optimizer was given" in seen[stage]
    assert "ZeRO stage 0" in seen[stage]
