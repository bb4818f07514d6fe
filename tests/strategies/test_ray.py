"""Ray Train runs a module with warmup, batch-size scaling and monitor, also if a worker is killed."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lars import BatchSizeScaling, LearningRateWarmup
from tests.support.boring import trainer
from tests.workers.ray_runs import made

pytest.importorskip("ray.train", reason="Ray Train is not installed: pip install 'ray[train]'")
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(590)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the folder of a run, which another process makes, as Ray leaves threads behind."""
    folders = {}

    def run_once(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
                "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
            }
            command = [sys.executable, "-m", "tests.workers.ray_runs", name, str(folders[name])]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-5000:]
        return folders[name]

    return run_once


def trained(folder):
    return torch.load(folder / "trained.ckpt", weights_only=False)


def logged(folder, version):
    """Largest trust ratio and largest effective learning rate by step."""
    with (folder / f"logs/version_{version}/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["trust_ratio/max"]]
    return {int(row["step"]): (float(row["trust_ratio/max"]), float(row["effective_lr/max"])) for row in rows}


def test_two_workers_train_with_warmup_and_scaling(run):
    whole = logged(run("whole"), 0)
    assert list(whole) == list(range(22))
    for step, (ratio, rate) in whole.items():
        # The square root of two workers, after a warmup of five steps.
        assert rate / ratio == pytest.approx(4 * 2**0.5 * min(1, (step + 1) / 5))


def test_a_run_in_which_a_worker_is_killed_ends_with_the_same_numbers(run):
    assert (run("killed") / "killed").exists()
    whole, killed = trained(run("whole")), trained(run("killed"))
    assert whole["global_step"] == killed["global_step"] == 22
    torch.testing.assert_close(killed["state_dict"], whole["state_dict"], rtol=0, atol=0)
    (one,), (other,) = whole["optimizer_states"], killed["optimizer_states"]
    assert one["param_groups"] == other["param_groups"]
    assert one["state"]
    torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)


def test_the_monitor_logs_every_step_before_and_after_a_worker_is_killed(run):
    before, after = logged(run("killed"), 0), logged(run("killed"), 1)
    # The epoch that was interrupted begins again.
    assert 11 <= max(before) < 22
    assert list(after) == list(range(11, 22))
    assert {**before, **after} == logged(run("whole"), 0)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_callbacks_and_accumulation_equal_one_device_though_a_worker_is_killed(run, tmp_path):
    assert (run("callbacks") / "killed").exists()
    killed = trained(run("callbacks"))
    module, data = made()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    # Two workers with 64 samples each take the same ones in a step.
    sampler = DistributedSampler(data, num_replicas=1, rank=0, seed=0)
    callbacks = [BatchSizeScaling(base_batch_size=64, rule="sqrt"), LearningRateWarmup(warmup_steps=5)]
    alone = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=callbacks)
    alone.fit(module, DataLoader(data, 128, sampler=sampler, drop_last=True))
    assert alone.global_step == killed["global_step"] == 8
    torch.testing.assert_close(killed["state_dict"], module.state_dict(), rtol=0, atol=1e-12)
    (state,) = killed["optimizer_states"]
    torch.testing.assert_close(state["state"], alone.optimizers[0].state_dict()["state"], rtol=0, atol=1e-12)
    assert all((module.state_dict()[name] - value).abs().max() > 1e-4 for name, value in start.items())
