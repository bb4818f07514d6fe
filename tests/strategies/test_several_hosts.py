"""The examples of runs on several hosts end where one device does, also after a host has died."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.support.hosts import NAMES, two_hosts
from tests.support.ranks import once

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

EXAMPLES = Path(__file__).parents[2] / "examples"
EPOCHS, BATCH_SIZE = 4, 128
DIES_AFTER = 0
# Seconds that a run may take, of which most pass until all processes have started.
LIMIT = 420
ARGUMENTS = ["--accelerator", "cpu", "--epochs", str(EPOCHS), "--norm", "group"]
# FSDP2 has no double precision in Lightning.
PRECISION = {"ddp": "64-true", "fsdp2": "32-true"}


class Run:
    """Training in a folder that both hosts see."""

    def __init__(self, folder, strategy):
        self.folder, self.strategy = folder, strategy
        self.log = folder / "log.txt"
        self.last = folder / "checkpoints" / "last.ckpt"
        self.environment = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        self.arguments = [
            *ARGUMENTS,
            *("--strategy", strategy, "--precision", PRECISION[strategy], "--batch-size", str(BATCH_SIZE)),
            *("--checkpoint-dir", str(folder / "checkpoints"), "--log-dir", str(folder / "logs")),
        ]

    def with_torchrun(self, rank, host):
        """Start the script for torchrun on a host."""
        settings = {"HEAD": NAMES[0], "NODES": "2", "DEVICES": "1"}
        script = ["sh", str(EXAMPLES / "multi_node" / "torchrun.sh")]
        return host.start([*script, *self.arguments], self.log, {**self.environment, **settings})

    def with_slurm(self, rank, host):
        """Start on a host what the batch script passes to srun, as srun would."""
        job = {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "train",
            "SLURM_NNODES": "2",
            "SLURM_NODELIST": "host[0-1]",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_SUBMIT_DIR": str(EXAMPLES.parent),
        }
        passed = self.folder / "passed"
        srun = self.folder / "srun"
        srun.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {passed}\n')
        srun.chmod(0o755)
        batch = ["bash", str(EXAMPLES / "multi_node" / "train.sbatch"), *self.arguments]
        path = f"{self.folder}{os.pathsep}{self.environment['PATH']}"
        subprocess.run(batch, check=True, env={**os.environ, **job, "PATH": path})
        option, *command = passed.read_text().splitlines()
        assert option == "--kill-on-bad-exit=1"
        task = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0"}
        environment = {**self.environment, **job, **task}
        return host.start(command, self.log, environment)

    def after(self, epoch):
        """Return the parameters and the optimizer's state after an epoch, by name."""
        path = self.last.with_name(f"epoch={epoch}.ckpt")
        if path.is_dir():
            dcp_to_torch_save(path, self.folder / "whole.pt")
            saved = torch.load(self.folder / "whole.pt", weights_only=False)
            states = saved["optimizer_0"]["state"]
        else:
            saved = torch.load(path, weights_only=False)
            (optimizer,) = saved["optimizer_states"]
            names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
            states = {names[i]: state for i, state in optimizer["state"].items()}
        moments = {f"{name} {key}": states[name][key] for name in states for key in states[name]}
        return {**saved["state_dict"], **moments}


def wait_until(condition, processes, log):
    """Wait, as long as none of the processes has failed."""
    until = time.monotonic() + LIMIT
    while not condition():
        has_failed = any(process.poll() for process in processes)
        assert not has_failed, log.read_text()[-10_000:]
        assert time.monotonic() < until, log.read_text()[-10_000:]
        time.sleep(0.02)


def have_ended(processes):
    return lambda: all(process.poll() == 0 for process in processes)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Training on two hosts, one device on each: of a SLURM job with DDP, of torchrun with FSDP2."""

    @once
    def trained(strategy):
        folder = tmp_path_factory.mktemp(strategy)
        run = Run(folder, strategy)
        with two_hosts(folder) as hosts:
            start = run.with_slurm if strategy == "ddp" else run.with_torchrun
            processes = [start(rank, host) for rank, host in enumerate(hosts)]
            wait_until(have_ended(processes), processes, run.log)
        return run

    return trained


def alone(folder, strategy):
    """Train on one device, with the batches of both hosts."""
    run = Run(folder, "ddp")
    # This strategy of one device draws the batches as those of two do.
    options = ["--devices", "1", "--precision", PRECISION[strategy], "--batch-size", str(2 * BATCH_SIZE)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "environ", os.environ.copy())
        patched.setattr(sys, "argv", ["train.py", *run.arguments, *options])
        patched.syspath_prepend(str(EXAMPLES))
        try:
            importlib.import_module("train").main()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return run


def deviation(actual, expected):
    assert actual.keys() == expected.keys()
    return max((actual[name] - expected[name]).abs().max().item() for name in expected)


@pytest.mark.parametrize(("strategy", "epoch", "tolerance"), [("ddp", EPOCHS - 1, 1e-12), ("fsdp2", 0, 1e-6)])
def test_two_hosts_move_parameters_and_state_as_one_device_does(
    tmp_path, uninterrupted, strategy, epoch, tolerance
):
    # In single precision sums in another order grow apart after more steps.
    expected = alone(tmp_path, strategy).after(epoch)
    assert any("momentum_buffer" in name for name in expected)
    assert deviation(uninterrupted(strategy).after(epoch), expected) < tolerance


@pytest.mark.parametrize("strategy", PRECISION)
def test_a_host_that_dies_and_comes_back_resumes_to_the_same_numbers(tmp_path, uninterrupted, strategy):
    expected = uninterrupted(strategy).after(EPOCHS - 1)
    run = Run(tmp_path, strategy)
    with two_hosts(tmp_path) as hosts:
        processes = [run.with_torchrun(rank, host) for rank, host in enumerate(hosts)]
        wait_until(lambda: run.last.resolve().name == f"epoch={DIES_AFTER}.ckpt", processes, run.log)
        hosts[1].die()
        assert run.last.resolve().name != f"epoch={EPOCHS - 1}.ckpt"
        processes[1] = run.with_torchrun(1, hosts[1])
        wait_until(have_ended(processes), processes, run.log)
    assert "Restored all states from the checkpoint" in run.log.read_text()
    # Lightning loads weights of double precision into a module that it makes double afterwards.
    rounding = 1e-6 if strategy == "ddp" else 0
    assert deviation(run.after(EPOCHS - 1), expected) <= rounding
