"""8-bit state in a Trainer, under DDP and FSDP2, and in their checkpoints."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.utils.data import DataLoader

from lightning_lars import LAMB8bit, LARS8bit, build_optimizer
from tests.support.eight_bit import needs_torchao
from tests.support.ranks import on_ranks, once
from tests.workers.eight_bit import (
    CLASSES,
    MAKES,
    RESUMED,
    STEPS,
    batches,
    build,
    in_triton,
    network,
    refusal,
    step,
    train,
    values,
)
from tests.workers.eight_bit_lightning import train as train_in_trainers

needs_torchao()

distributed = pytest.mark.distributed
strategies = pytest.mark.parametrize("strategy", MAKES)
# Strategy, optimizer and bits of the state that is saved, and of that which goes on.
GOES_ON = {
    ("ddp", "LAMB", 8): [8],
    ("ddp", "LARS", 8): [32],
    ("ddp", "LARS", 32): [8],
    ("fsdp2", "LAMB", 8): [8],
    ("fsdp2", "LARS", 8): [8],
    ("fsdp2 full", "LAMB", 8): [8, 32],
    ("fsdp2 full", "LAMB", 32): [8],
}
names = pytest.mark.parametrize("name", CLASSES)


@once
def seen(strategy, name):
    """What each of two ranks saw."""
    return on_ranks(2, train, strategy, name)


@pytest.fixture(scope="module")
def in_trainers(tmp_path_factory):
    """What each of two ranks saw in Trainers."""
    folder = tmp_path_factory.mktemp("trainers")

    @once
    def seen(*run):
        return on_ranks(2, train_in_trainers, folder, *run, GOES_ON[run])

    return seen


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
def test_parameters_match_one_device_after_every_step(strategy, name):
    for process in seen(strategy, name):
        for actual, expected in zip(process["values"], alone(name), strict=True):
            assert_close(actual, expected)


@distributed
@strategies
@names
def test_a_sharded_checkpoint_resumes(strategy, name):
    for process in seen(strategy, name):
        assert_close(process["resumed"], process["values"][-1])


@distributed
@strategies
@names
def test_full_checkpoint_resumes_on_one_device(strategy, name):
    net = network()
    net.load_state_dict(seen(strategy, name)[0]["values"][RESUMED - 1])
    optimizer = build(name, net)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(net, optimizer, seen(strategy, name)[0]["full"], options=options)
    for batch in batches()[RESUMED:]:
        step(net, optimizer, batch)
    assert_close(values(net), seen(strategy, name)[0]["values"][-1])


@distributed
@names
def test_a_full_checkpoint_holds_nothing_that_is_still_on_its_way(name):
    for state in seen("fsdp2", name)[0]["full"]["state"].values():
        for value in state.values():
            parts = [getattr(value, part, value) for part in ("codes", "scale", "qmap")]
            assert {type(part) for part in parts} == {torch.Tensor}


@distributed
@pytest.mark.parametrize("run", [run for run in GOES_ON if run[2] in GOES_ON[run]], ids=str)
def test_trainers_on_two_ranks_resume_exactly(in_trainers, run):
    for (straight, in_eight_bits), resumed in in_trainers(*run):
        again, again_in_eight_bits = resumed[8]
        assert in_eight_bits == again_in_eight_bits == ["net.0.weight", "net.2.weight"]
        assert straight.keys() == again.keys()
        for key, value in straight.items():
            assert torch.equal(again[key], value), key


@distributed
@pytest.mark.parametrize("run", [run for run in GOES_ON if 32 in (run[2], *GOES_ON[run])], ids=str)
def test_trainers_on_two_ranks_continue_in_the_other_kind(in_trainers, run):
    other = 40 - run[2]
    seen = in_trainers(*run)
    _, of_the_first = seen[0]
    for (straight, _), resumed in seen:
        again, in_eight_bits = resumed[other]
        assert in_eight_bits == (["net.0.weight", "net.2.weight"] if other == 8 else [])
        for key, value in straight.items():
            assert (again[key] - value).norm() < 0.005 * value.norm(), key
            assert torch.equal(again[key], of_the_first[other][0][key]), key


@distributed
@strategies
@names
def test_layers_sharded_evenly_across_all_ranks_have_8_bit_state(strategy, name):
    for process in seen(strategy, name):
        assert process["in eight bits"] == ["0.weight", "2.weight"]


@distributed
def test_shards_of_fsdp1_are_refused():
    for message in on_ranks(2, refusal):
        assert "use fully_shard (FSDP2, ModelParallelStrategy), or 32-bit state" in message


@distributed
def test_kernels_for_gpus_step_shards_with_8_bit_state():
    pytest.importorskip("triton", minversion="3.3", reason="there is no triton for this system")
    for values_of_rank in on_ranks(2, in_triton):
        assert_close(values_of_rank, next(alone("LAMB")))


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
