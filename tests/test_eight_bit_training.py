"""8-bit state in a Trainer, under DDP and FSDP2, and in their checkpoints."""

import os
import subprocess
import sys

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.utils.data import DataLoader

from lightning_lars import LAMB8bit, LARS8bit, build_optimizer
from tests.workers.eight_bit import CLASSES, RESUMED, STEPS, batches, build, network, step, values
from tests.workers.eight_bit_lightning import STRATEGIES

pytest.importorskip("torchao", reason="there is no torchao for this system")

distributed = pytest.mark.distributed
strategies = pytest.mark.parametrize("make", ["ddp", "fsdp2"])
names = pytest.mark.parametrize("name", CLASSES)


def run(module, folder):
    """What each of two processes saw."""
    finished = subprocess.run(
        [sys.executable, "-m", module, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return run("tests.workers.eight_bit", tmp_path_factory.mktemp("eight_bit"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run("tests.workers.eight_bit_lightning", tmp_path_factory.mktemp("trainer"))


def alone(name):
    """Parameters after every step on one device."""
    net = network()
    optimizer = build(name, net)
    for batch in batches():
        step(net, optimizer, batch)
        yield values(net)


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        # An element between two codes may round to the other one.
        assert (actual[key] - value).norm() < 1e-4 * value.norm(), key


@distributed
@strategies
@names
def test_the_parameters_are_those_of_one_device_after_every_step(seen, make, name):
    for process in seen:
        for actual, expected in zip(process[make, name]["values"], alone(name), strict=True):
            assert_close(actual, expected)


@distributed
@strategies
@names
def test_a_sharded_checkpoint_goes_on(seen, make, name):
    for process in seen:
        assert_close(process[make, name]["resumed"], process[make, name]["values"][-1])


@distributed
@strategies
@names
def test_a_full_checkpoint_goes_on_on_one_device(seen, make, name):
    net = network()
    net.load_state_dict(seen[0][make, name]["values"][RESUMED - 1])
    optimizer = build(name, net)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(net, optimizer, seen[0][make, name]["full"], options=options)
    for batch in batches()[RESUMED:]:
        step(net, optimizer, batch)
    assert_close(values(net), seen[0][make, name]["values"][-1])


@distributed
@names
def test_a_full_checkpoint_holds_nothing_that_is_still_on_its_way(seen, name):
    for state in seen[0]["fsdp2", name]["full"]["state"].values():
        for value in state.values():
            parts = [getattr(value, part, value) for part in ("codes", "scale", "qmap")]
            assert {type(part) for part in parts} == {torch.Tensor}


@distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
@names
def test_trainers_of_two_processes_resume_exactly(trained, strategy, name):
    for process in trained:
        straight, in_eight_bits = process[strategy, name]["8"]
        resumed, resumed_in_eight_bits = process[strategy, name]["8 to 8"]
        assert in_eight_bits == resumed_in_eight_bits == ["net.0.weight", "net.2.weight"]
        assert straight.keys() == resumed.keys()
        for key, value in straight.items():
            assert torch.equal(resumed[key], value), key


@distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2 full"])
@pytest.mark.parametrize(("saved", "loaded"), [("32", "8"), ("8", "32")])
@names
def test_trainers_of_two_processes_go_on_in_the_other_kind(trained, strategy, saved, loaded, name):
    runs = [process[strategy, name] for process in trained]
    for of_each in runs:
        straight, _ = of_each[saved]
        resumed, in_eight_bits = of_each[f"{saved} to {loaded}"]
        assert in_eight_bits == (["net.0.weight", "net.2.weight"] if loaded == "8" else [])
        for key, value in straight.items():
            assert (resumed[key] - value).norm() < 0.005 * value.norm(), key
            assert torch.equal(resumed[key], runs[0][f"{saved} to {loaded}"][0][key]), key


@distributed
@strategies
@names
def test_layers_that_all_processes_share_evenly_are_in_eight_bits(seen, make, name):
    for process in seen:
        assert process[make, name]["in eight bits"] == ["0.weight", "2.weight"]


@distributed
def test_shards_of_fsdp1_are_refused(seen):
    for process in seen:
        assert "use fully_shard (FSDP2, ModelParallelStrategy), or 32-bit state" in process["refusal"]


@distributed
def test_kernels_for_gpus_leave_shards_to_single_operations(seen):
    pytest.importorskip("triton", reason="there is no triton for this system")
    for process in seen:
        assert "8-bit state of layers that are divided between processes" in process["in triton"][True]
        assert_close(process["in triton"][None], next(alone("LAMB")))


class Model(lightning.LightningModule):
    def __init__(self, optimizer_class):
        super().__init__()
        self.net = network()
        self.optimizer_class = optimizer_class

    def training_step(self, _, batch_idx):
        # By number, as Lightning does not skip the batches that a checkpoint has seen.
        return self.net(batches()[batch_idx]).square().sum(1).mean()

    def train_dataloader(self):
        return DataLoader(range(STEPS), batch_size=1)

    def configure_optimizers(self):
        return build_optimizer(self, self.optimizer_class, lr=0.1)


def fit(model, precision, callbacks=(), ckpt_path=None):
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_steps=8,
        max_epochs=-1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("optimizer_class", [LARS8bit, LAMB8bit])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_trainer_resumes_exactly(tmp_path, optimizer_class, precision):
    straight = Model(optimizer_class)
    path = tmp_path / "middle.ckpt"
    save = LambdaCallback(
        on_train_batch_end=lambda trainer, *_: trainer.global_step == 3 and trainer.save_checkpoint(path)
    )
    fit(straight, precision, [save])
    resumed = Model(optimizer_class)
    trainer = fit(resumed, precision, ckpt_path=path)
    assert len(trainer.optimizers[0].trust_ratios()) == 3
    for p, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, other)
