"""A rank that fails in a step ends the others at once, and what was saved can be resumed."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.ranks import on_ranks
from tests.support.small_network import RESUMED, deviation
from tests.workers import failing
from tests.workers.lightning_strategies import OPTIMIZERS, Used, fit

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:LAMB moves excluded parameters"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

# Seconds until all processes run, and from the error to the end of all; the process group waits 1,800.
STARTS_IN, ENDS_IN = 400, 60
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CAUSES = {
    "ddp": "RuntimeError: .* sparse",
    "ddp fork": "RuntimeError: .* sparse",
    "fsdp2": "MemoryError: rank 1 has no memory left",
}
ENDS = {
    "torchrun": r"Root Cause \(first observed failure\):\n(.*\n){3}  rank +: 1 (.*\n)*.*{cause}",
    "lightning": r"\[rank1\]: {cause}",
    "lightning fork": r"-- Process 1 terminated with the following error:\n(.*\n)*{cause}",
}


@pytest.mark.parametrize(
    ("launcher", "name"),
    [
        ("torchrun", "ddp"),
        ("torchrun", "fsdp2"),
        ("lightning", "ddp"),
        ("lightning", "fsdp2"),
        ("lightning fork", "ddp fork"),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_error_and_its_run_resumes(tmp_path, launcher, name):
    log = tmp_path / "log.txt"
    arguments = [*(TORCHRUN if launcher == "torchrun" else []), failing.__file__, str(tmp_path), name]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until = time.monotonic() + STARTS_IN
        while failing.FAILS_NOW not in log.read_text() and process.poll() is None:
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        assert process.wait(ENDS_IN) != 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    printed = log.read_text()
    assert failing.FAILS_NOW in printed
    assert re.search(ENDS[launcher].replace("{cause}", CAUSES[name]), printed), printed

    saved = tmp_path / "steps" / f"step={RESUMED}.ckpt"
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    arguments = Used, OPTIMIZERS["LAMB"], "auto", {}
    whole = fit(tmp_path / "whole", *arguments, devices=1)["values"]
    resumed = fit(tmp_path / "again", *arguments, checkpoint=saved, devices=1)["values"]
    assert len(resumed) == len(whole) - RESUMED
    for again, straight in zip(resumed, whole[RESUMED:], strict=True):
        assert deviation(again, straight) < 1e-6


def test_a_rank_that_waits_for_another_in_vain_raises_after_the_timeout():
    waits, leaves_out = on_ranks(2, failing.wait_in_vain, 2)
    assert "Timed out waiting 2000ms" in waits
    assert leaves_out is None


def test_hosts_that_share_no_folder_of_checkpoints_all_raise_before_they_train(tmp_path):
    (tmp_path / "0.ckpt").touch()
    examples = Path(__file__).parents[2] / "examples"
    for error in on_ranks(2, failing.share_no_folder, str(tmp_path), str(examples)):
        assert "all hosts must share --checkpoint-dir" in error
