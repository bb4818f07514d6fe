"""Two processes take the steps of one with the same effective batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lars import BatchSizeScaling, LearningRateWarmup
from tests.support.walk import BATCH_SIZE, BATCHES, RATES, Walk, scaled, walk
from tests.workers.learning_rate import BASE, WARMUP

pytestmark = pytest.mark.distributed
REPLICAS = {"ddp": 2, "fsdp2": 2, "tensor parallel": 1}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left."""
    path = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "tests.workers.learning_rate", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return path


def close(rates):
    return [pytest.approx(step, rel=1e-12, abs=1e-14) for step in rates]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("strategy", REPLICAS)
def test_the_replicas_multiply_the_batch_and_the_rates(folder, strategy, rank):
    seen = json.loads((folder / f"{rank}.json").read_text())[strategy]
    steps, scale = BATCHES // REPLICAS[strategy], BATCH_SIZE * REPLICAS[strategy] / BASE
    assert seen["size"] == BATCH_SIZE * REPLICAS[strategy]
    expected = scaled([RATES] * steps, [scale * min(1.0, step / WARMUP) for step in range(1, steps + 1)])
    assert [tuple(step) for step in seen["rates"]] == close(expected)


def test_two_processes_go_where_one_goes_that_accumulates_two_batches(folder, tmp_path):
    callbacks = LearningRateWarmup(WARMUP), BatchSizeScaling(BASE)
    one = walk(tmp_path, Walk(), *callbacks, accumulate_grad_batches=2, max_epochs=1)
    two = json.loads((folder / "0.json").read_text())["ddp"]["path"]
    assert [tuple(position) for position in two] == close(one.path[::2])


def test_one_process_goes_on_from_two_and_scales_anew(folder, tmp_path):
    warmup, steps = LearningRateWarmup(BATCHES), BATCHES // 2
    module = walk(tmp_path, Walk(), warmup, BatchSizeScaling(BASE), ckpt_path=folder / "ddp.ckpt")
    counts = range(steps + 1, steps + BATCHES + 1)
    factors = [BATCH_SIZE / BASE * min(1.0, step / BATCHES) for step in counts]
    assert module.rates() == close(scaled([RATES] * BATCHES, factors))
