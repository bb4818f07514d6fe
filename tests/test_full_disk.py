"""What remains, and what can go on, if the disk is full when something is saved."""

import gc
import json
import shutil
import subprocess
import sys
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
import rich
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit, TrustRatioMonitor
from lightning_lars.run_report.command import main
from tests.support.boring import boring, trainer
from tests.support.checkpoints import UNSAFELY
from tests.support.full_disk import NO_SPACE, full_disk
from tests.support.ranks import on_ranks
from tests.support.small_network import deviation
from tests.workers import elastic, full_disk_ranks

# So that the moments of these small layers are in 8 bits.
QUANTIZED = {LARS8bit: {"min_8bit_size": 256}, LAMB8bit: {"min_8bit_size": 256}}
OPTIMIZERS = [LARS, LAMB, pytest.param(LARS8bit, marks=pytest.mark.slow), LAMB8bit]


class FillsTheDisk(Callback):
    """From one step on, as another job on the same machine would, until the run has ended."""

    def __init__(self, step):
        self.step = step
        self.disk = ExitStack()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.disk.enter_context(full_disk())

    def on_exception(self, trainer, pl_module, exception):
        self.disk.close()

    def teardown(self, trainer, pl_module, stage):
        self.disk.close()


def assert_same(optimizer, other):
    """The same hyperparameters and state, to the bit."""
    one, two = optimizer.state_dict(), other.state_dict()
    assert one["param_groups"] == two["param_groups"]
    assert one["state"]
    torch.testing.assert_close(one["state"], two["state"], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_a_run_that_the_full_disk_ended_goes_on_from_the_checkpoint_before(tmp_path, optimizer_class):
    def fit(folder, *callbacks, **resume):
        module = boring(partial(optimizer_class, lr=0.1, **QUANTIZED.get(optimizer_class, {})), width=512)
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2)
        options = {"max_steps": 8, "max_epochs": -1, "overfit_batches": 1, "enable_checkpointing": True}
        fitting = trainer(tmp_path, callbacks=[saving, *callbacks], **options)
        try:
            fitting.fit(module, **resume)
        finally:
            fitted.append((fitting, module))

    fitted = []
    with pytest.raises(OSError, match=NO_SPACE):
        fit(tmp_path, FillsTheDisk(5))
    fit(tmp_path / "whole")
    fit(tmp_path / "resumed", ckpt_path=tmp_path / "step=4.ckpt", **UNSAFELY)
    (crashed, _), (whole, module), (resumed, again) = fitted
    assert crashed.global_step == 6
    assert whole.global_step == resumed.global_step == 8
    for one, two in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert_same(whole.optimizers[0], resumed.optimizers[0])


def save_by_torch(net, optimizer, path):
    # Through a file of Python's: its error is the context of torch's, which is about a position in the file.
    with path.open("wb") as file:
        torch.save(optimizer.state_dict(), file)


def load_by_torch(net, optimizer, path):
    optimizer.load_state_dict(torch.load(path))


def save_by_dcp(net, optimizer, path):
    dcp.save(get_optimizer_state_dict(net, optimizer), checkpoint_id=path)


def load_by_dcp(net, optimizer, path):
    state = get_optimizer_state_dict(net, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_optimizer_state_dict(net, optimizer, state)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
# With Python 3.13, torch's writer of a file that could not be written raises once more when it is collected.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*NoCloseWriter")
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize(
    ("save", "load"), [(save_by_torch, load_by_torch), (save_by_dcp, load_by_dcp)], ids=["torch", "dcp"]
)
def test_an_optimizer_that_could_not_be_saved_goes_on(tmp_path, optimizer_class, save, load):
    def start():
        torch.manual_seed(0)
        net = nn.Linear(128, 96)
        return net, optimizer_class(net.named_parameters(), lr=0.1)

    def step(net, optimizer):
        optimizer.zero_grad()
        net(torch.ones(3, 128)).pow(2).sum().backward()
        optimizer.step()

    run = net, optimizer = start()
    never_saved = start()
    for each in (run, never_saved):
        step(*each)
    save(*run, tmp_path / "first")
    with full_disk(), pytest.raises((RuntimeError, CheckpointException)) as raised:
        save(*run, tmp_path / "second")
    assert NO_SPACE in f"{raised.value} {raised.value.__context__}"
    del raised
    gc.collect()
    assert_same(optimizer, never_saved[1])
    resumed = start()
    step(*resumed)
    step(*resumed)
    resumed[0].load_state_dict(net.state_dict())
    load(*resumed, tmp_path / "first")
    for each in (run, never_saved, resumed):
        step(*each)
    for other in (never_saved, resumed):
        assert torch.equal(net.weight, other[0].weight)
        assert_same(optimizer, other[1])


@pytest.mark.filterwarnings("ignore:trust_coefficient")
@pytest.mark.parametrize(
    "output",
    [
        {"report": "run.html"},
        pytest.param({"picture": "run.pdf"}, marks=pytest.mark.slow),
        pytest.param({"picture": "run.png"}, marks=pytest.mark.slow),
        pytest.param({"picture": "run.svgz"}, marks=pytest.mark.slow),
    ],
    ids=lambda output: next(iter(output.values())),
)
def test_a_report_that_the_full_disk_refuses_is_a_warning(tmp_path, output):
    (name,) = output.values()
    callbacks = [TrustRatioMonitor(**output), FillsTheDisk(2)]
    fitting = trainer(tmp_path, callbacks=callbacks, max_steps=3, log_every_n_steps=1)
    with pytest.warns(UserWarning, match=rf"could not save its (report|plot) .*{name}: .*{NO_SPACE}"):
        fitting.fit(boring())
    assert fitting.state.finished
    assert fitting.global_step == 3


@pytest.mark.filterwarnings("ignore:trust_coefficient")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this platform")
def test_a_table_that_cannot_be_printed_is_a_warning(tmp_path):
    output = Path("/dev/full").open("w")  # noqa: SIM115
    rich.reconfigure(file=output)
    monitored = trainer(tmp_path, callbacks=[TrustRatioMonitor(table=True)], log_every_n_steps=1)
    with pytest.warns(UserWarning, match="could not print its table: .*No space left on device"):
        monitored.fit(boring())
    with suppress(OSError):  # it has kept what it could not write
        output.close()


def test_the_command_names_the_report_that_it_cannot_write(tmp_path, capsys):
    log = tmp_path / "metrics.csv"
    log.write_text("step,loss\n0,2.0\n10,1.0\n")
    with pytest.raises(SystemExit), full_disk(100):
        main([str(log), "-o", str(tmp_path / "run.html")])
    assert f"{NO_SPACE}: '{tmp_path / 'run.html'}'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("temporary", ["disk", "elsewhere"])
def test_what_remains_where_a_checkpoint_is_replaced_on_a_full_disk(tmp_path, temporary):
    for name in ("disk", "elsewhere"):
        (tmp_path / name).mkdir()
    # A disk of its own, which is gone when the process ends.
    mount = ["sh", "-c", 'mount -t tmpfs -o size=128k tmpfs "$0" && exec "$@"', str(tmp_path / "disk")]
    alone = ["unshare", "--user", "--map-root-user", "--mount", *mount]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("unshare cannot give a process a file system of its own here")
    command = [sys.executable, "-m", "tests.workers.full_disk", tmp_path / "disk", tmp_path / temporary]
    run = subprocess.run([*alone, *command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert "No space left on device" in result["error"]
    assert result["left"]["kept-step=4.ckpt"] == 4
    # Lightning moves a temporary file to its place: from another file system, it is copied over the old one.
    assert result["left"]["last.ckpt"] == (4 if temporary == "disk" else None)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", elastic.RATES)
def test_ranks_name_the_one_whose_disk_is_full_and_go_on(tmp_path, name):
    ends = on_ranks(2, full_disk_ranks.go_on_or_resume, name, str(tmp_path))
    expected = elastic.alone(name)
    moved = deviation(expected, dict(elastic.network(name).named_parameters()))
    assert moved > 0.05
    for message, went_on, resumed in ends:
        assert "ranks:dict_keys([1])" in message
        assert NO_SPACE in message
        assert deviation(went_on, resumed) == 0
        # State in eight bits is rounded, of float32 sums in another order.
        assert deviation(went_on, expected) < (0.02 * moved if name == "LAMB8bit" else 1e-9)
