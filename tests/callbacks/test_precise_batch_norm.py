"""Recomputed running statistics, and everything that recomputing them must preserve."""

import logging
import random
import re
import threading
import time

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from lightning_lars.callbacks.precise_batch_norm import PreciseBatchNorm
from tests.support.boring import trainer
from tests.support.normed import BATCH_SIZE, SAMPLES, Noisy, Normed, assert_precise, is_precise
from tests.support.ranks import on_ranks, once
from tests.workers import precise_batch_norm as worker

BATCHES = SAMPLES // BATCH_SIZE


class Module(Normed, LightningModule):
    pass


def chunks(number=BATCHES):
    return Noisy().data.split(BATCH_SIZE)[:number]


def fit(tmp_path, module, *callbacks, **options):
    made = trainer(tmp_path, callbacks=list(callbacks), **{"num_sanity_val_steps": 0, **options})
    made.fit(module)
    return module


@pytest.mark.parametrize("number", [1, 4, 100])
def test_validation_sees_the_statistics_of_all_inputs_in_so_many_batches(tmp_path, number):
    module = fit(tmp_path, Module(), PreciseBatchNorm(number), max_epochs=2)
    assert len(module.validated) == 2
    for state in module.validated:
        assert_precise(state, chunks(number))
        assert not is_precise(state, chunks(min(number, BATCHES) - 1 or 2))


def test_without_it_the_running_averages_are_far_off(tmp_path):
    (state,) = fit(tmp_path, Module()).validated
    assert not is_precise(state, chunks())


@pytest.mark.parametrize("root", [lightning.pytorch, pytorch_lightning])
def test_works_in_the_trainers_of_both_packages(tmp_path, root):
    module = type("Module", (Normed, root.LightningModule), {})()
    options = {"max_epochs": 1, "logger": False, "default_root_dir": tmp_path, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": True, "enable_model_summary": False, "enable_checkpointing": False}
    root.Trainer(callbacks=[PreciseBatchNorm()], **options, **quiet).fit(module)
    assert_precise(module.validated[0], chunks())


def test_the_checkpoint_of_a_validation_holds_the_validated_statistics(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    module = fit(tmp_path, Module(), checkpoint, PreciseBatchNorm(), enable_checkpointing=True, max_epochs=2)
    saved = [torch.load(path, weights_only=False)["state_dict"] for path in sorted(tmp_path.glob("*.ckpt"))]
    assert len(saved) == 2
    for validated, state in zip(module.validated, saved, strict=True):
        assert_precise(state, chunks())
        assert all(torch.equal(validated[name], state[name]) for name in state)


def test_a_fit_without_validation_saves_precise_statistics_at_the_end_of_an_epoch(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path)
    fit(
        *(tmp_path, Module(), checkpoint, PreciseBatchNorm()),
        enable_checkpointing=True,
        limit_val_batches=0,
    )
    assert_precise(torch.load(checkpoint.best_model_path, weights_only=False)["state_dict"], chunks())


def test_recomputes_at_the_end_if_there_were_steps_after_the_last_validation(tmp_path):
    options = {"max_steps": 5, "max_epochs": -1, "val_check_interval": 4}
    module = fit(tmp_path, Module(), PreciseBatchNorm(), **options)
    assert len(module.validated) == 1
    assert not torch.equal(module.validated[0]["net.0.weight"], module.net[0].weight)
    assert_precise(module.state_dict(), chunks())


class Passes:
    """Counts what forward is called for."""

    def __init__(self):
        self.training = 0

    def __call__(self, layer, inputs):
        self.training += layer.training and not torch.is_grad_enabled()


def test_does_not_recompute_twice_at_one_step(tmp_path):
    module, passes = Module(), Passes()
    module.net[1].register_forward_pre_hook(passes)
    fit(tmp_path, module, PreciseBatchNorm())
    assert passes.training == BATCHES


@pytest.mark.parametrize("options", [{"fast_dev_run": 1}, {"limit_train_batches": 1}])
def test_takes_no_more_batches_than_training(tmp_path, options):
    (state,) = fit(tmp_path, Module(), PreciseBatchNorm(), **options).validated
    assert_precise(state, chunks(1))


def test_works_in_a_barebones_trainer(tmp_path):
    module = Module()
    module.log = lambda *_: None
    made = lightning.pytorch.Trainer(
        barebones=True, max_epochs=1, accelerator="cpu", callbacks=[PreciseBatchNorm()]
    )
    made.fit(module)
    assert_precise(module.validated[0], chunks())


class Large(Noisy):
    """Data that must not be copied."""

    def __deepcopy__(self, memo):
        raise AssertionError("is copied")


class Counting(RandomSampler):
    """Begins elsewhere every time that it is iterated, as samplers with a state of their own do."""

    times = 0

    def __iter__(self):
        self.times += 1
        return iter(torch.arange(SAMPLES).roll(self.times).tolist())


LOADERS = {
    "shuffled": lambda data: DataLoader(data, batch_size=BATCH_SIZE, shuffle=True),
    "own generator": lambda data: DataLoader(
        data, batch_size=BATCH_SIZE, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "weighted": lambda data: DataLoader(
        data,
        batch_size=BATCH_SIZE,
        sampler=WeightedRandomSampler(torch.arange(1.0, SAMPLES + 1), SAMPLES, generator=torch.Generator()),
    ),
    "stateful sampler": lambda data: DataLoader(data, batch_size=BATCH_SIZE, sampler=Counting(data)),
    "persistent workers": lambda data: DataLoader(
        data, batch_size=BATCH_SIZE, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "two loaders": lambda data: CombinedLoader(
        [DataLoader(data, batch_size=BATCH_SIZE, shuffle=True), DataLoader(data, batch_size=2 * BATCH_SIZE)],
        "max_size_cycle",
    ),
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_training_is_unaffected_by_it(tmp_path, loader):
    class Watched(Module):
        def training_step(self, batch, batch_idx):
            # The first of two loaders.
            return super().training_step(batch[0] if isinstance(batch[0], list) else batch, batch_idx)

        def precise_batch_norm_forward(self, batch):
            self(batch[0][0] if isinstance(batch[0], list) else batch[0])

    def run(*callbacks):
        module = Watched(loader(Large(noise=1.0)))
        # Validates in the middle of epochs and of accumulated gradients.
        options = {"val_check_interval": 2, "accumulate_grad_batches": 3, "max_epochs": 2}
        fit(tmp_path, module, *callbacks, **options)
        return module, (random.random(), np.random.rand(), torch.rand(()).item())

    (without, draws), (precise, same_draws) = run(), run(PreciseBatchNorm(4))
    assert precise.losses == without.losses
    assert precise.seen == without.seen
    assert same_draws == draws
    moved = {
        name
        for name, value in without.state_dict().items()
        if not torch.equal(value, precise.state_dict()[name])
    }
    running = {f"net.{layer}.running_{of}" for layer in (1, 5) for of in ("mean", "var")}
    assert moved == running


def test_dropout_is_off_and_other_layers_and_buffers_are_untouched(tmp_path):
    class Busy(Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("rebound", torch.zeros(()))
            self.instance = nn.InstanceNorm1d(2, track_running_stats=True).double()
            self.dropped = nn.Dropout(0.5)
            self.at_validation = []

        def forward(self, x):
            self.calls += 1
            self.rebound = self.rebound + 1
            self.instance(x.new_ones(2, 2, 2))
            if not torch.is_grad_enabled() and not self.trainer.validating:
                assert torch.equal(self.dropped(x), x)
            return super().forward(x)

        def on_validation_batch_start(self, batch, batch_idx):
            super().on_validation_batch_start(batch, batch_idx)
            self.at_validation.append({module.training for module in self.modules()})

    plain, precise = fit(tmp_path, Busy()), fit(tmp_path, Busy(), PreciseBatchNorm())
    assert_precise(precise.validated[0], chunks())
    for name in ("calls", "rebound", "instance.running_mean", "net.1.num_batches_tracked"):
        assert torch.equal(precise.state_dict()[name], plain.state_dict()[name]), name
    assert all(modes == {False} for modes in precise.at_validation)
    assert all(module.training for module in precise.modules())
    assert (precise.net[1].momentum, precise.net[5].momentum) == (0.1, 0.3)
    assert not precise.net[1]._forward_hooks
    assert not precise.net[1]._forward_pre_hooks


@pytest.mark.parametrize("how", ["eval", "track_running_stats"])
def test_frozen_layers_are_left_alone(tmp_path, how):
    class Frozen(Module):
        def on_train_epoch_start(self):
            if how == "eval":
                self.net[1].eval()
            else:
                self.net[1].track_running_stats = False

    module = Frozen()
    before = {name: value.clone() for name, value in module.net[1].named_buffers()}
    fit(tmp_path, module, PreciseBatchNorm(), max_epochs=2)
    assert all(torch.equal(value, before[name]) for name, value in module.net[1].named_buffers())
    assert not torch.equal(module.net[5].running_mean, torch.zeros(4).double())
    assert module.net[1].training == (how != "eval")


def test_the_module_can_say_how_a_batch_goes_through_its_layers(tmp_path):
    class Own(Module):
        def forward(self, index):
            raise AssertionError("takes something else")

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).pow(2).mean()

        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

        def precise_batch_norm_forward(self, batch):
            self.net(batch[0])

    (state,) = fit(tmp_path, Own(), PreciseBatchNorm()).validated
    assert_precise(state, chunks())


@pytest.mark.parametrize("root", [lightning.pytorch, pytorch_lightning])
def test_a_module_without_a_forward_pass_is_refused_before_it_is_trained(tmp_path, root):
    data = chunks()

    class Headless(root.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.BatchNorm1d(3).double()
            self.trained = 0

        def training_step(self, batch, batch_idx):
            self.trained += 1
            return self.layer(batch).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(module):
        made = root.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            callbacks=[PreciseBatchNorm()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        made.fit(module, DataLoader(torch.cat(data), batch_size=BATCH_SIZE))

    module = Headless()
    with pytest.raises(MisconfigurationException, match="forward, which Headless does not define: define it"):
        train(module)
    assert module.trained == 0
    # As an attribute, it is one.
    module.forward = lambda x: module.layer(x)
    train(module)
    assert module.trained == BATCHES
    module = Headless()
    module.layer = nn.Linear(3, 2).double()
    with pytest.warns(UserWarning, match="found no statistics to recompute"):
        train(module)


def test_an_error_in_forward_says_what_to_do_and_leaves_everything_unchanged(tmp_path):
    class Indexed(Module):
        fails_at = 2

        def forward(self, x):
            if self.net[1].training and not torch.is_grad_enabled():
                self.fails_at -= 1
                if not self.fails_at:
                    raise KeyError("image")
            return super().forward(x)

    module = Indexed()
    note = (
        r"passed Tensor from a training batch \(list\) to forward of Indexed.*define precise_batch_norm_forw"
    )
    with pytest.raises(KeyError) as caught:
        fit(tmp_path, module, PreciseBatchNorm())
    (said,) = caught.value.__notes__
    assert re.search(note, said)
    plain = fit(tmp_path, Module())
    for name, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert (module.net[1].momentum, module.net[1].training) == (0.1, False)  # in validation
    assert not module.net[1]._forward_hooks


def test_layers_that_forward_does_not_reach_keep_their_statistics_and_are_named(tmp_path):
    class Auxiliary(Module):
        def __init__(self):
            super().__init__()
            self.head = nn.BatchNorm1d(4).double()

        def training_step(self, batch, batch_idx):
            return self.head(self(batch[0])).sum()

    module = Auxiliary()
    with pytest.warns(UserWarning, match=r"did not recompute the running statistics of \['head'\]") as seen:
        fit(tmp_path, module, PreciseBatchNorm(), max_epochs=2)
    assert sum("did not recompute the running" in str(each.message) for each in seen) == 1
    plain = fit(tmp_path, Auxiliary(), max_epochs=2)
    assert torch.equal(module.head.running_var, plain.head.running_var)
    assert_precise(module.validated[0], chunks())


def test_a_model_without_batch_norm_warns(tmp_path):
    module = Module()
    module.net[1], module.net[5] = nn.LayerNorm(5).double(), nn.LayerNorm(4).double()
    with pytest.warns(UserWarning, match="found no statistics to recompute in Module: none of its 0 batch"):
        fit(tmp_path, module, PreciseBatchNorm())


def test_the_sanity_check_sees_the_statistics_that_are_there(tmp_path):
    class Sane(Module):
        def on_validation_batch_start(self, batch, batch_idx):
            if self.trainer.sanity_checking:
                assert torch.equal(self.net[1].running_mean, torch.zeros(5).double())
                self.checked = True
            super().on_validation_batch_start(batch, batch_idx)

    assert fit(tmp_path, Sane(), PreciseBatchNorm(), num_sanity_val_steps=2).checked


@pytest.mark.parametrize("function", ["validate", "test"])
def test_an_evaluation_alone_changes_nothing_and_says_so(tmp_path, function, caplog):
    module = Module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with caplog.at_level(logging.INFO):
        getattr(trainer(tmp_path, callbacks=[PreciseBatchNorm()]), function)(module, verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert f"recomputes nothing in trainer.{function}, which has no training" in caplog.text


def test_a_test_after_a_fit_has_the_statistics_of_the_fit(tmp_path, caplog):
    made = trainer(tmp_path, callbacks=[PreciseBatchNorm()], num_sanity_val_steps=0)
    module = Module()
    made.fit(module)
    with caplog.at_level(logging.INFO):
        made.test(module, verbose=False)
    assert_precise(module.state_dict(), chunks())
    assert "recomputes nothing" not in caplog.text


def test_a_batch_passes_the_hooks_of_training_in_its_precision(tmp_path):
    class Hooked(Module):
        passes = 0

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * (2 if self.trainer.training else 1), batch[1]]

        def forward(self, x):
            self.passes += not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)

        def validation_step(self, batch, batch_idx):
            assert self.trainer.validating

    module = fit(tmp_path, Hooked(), PreciseBatchNorm(), precision="bf16-mixed")
    assert_precise(module.validated[0], [2 * (x + 1) for x in chunks()])
    assert module.passes == BATCHES


def test_sees_into_compiled_layers(tmp_path):
    module = Module()
    module.net.compile(backend="eager")
    fit(tmp_path, module, PreciseBatchNorm(), max_epochs=3)
    assert len(module.validated) == 3
    for state in module.validated:
        assert_precise(state, chunks())


@pytest.mark.skipif(
    not hasattr(lightning.pytorch.callbacks, "EMAWeightAveraging"),
    reason="EMAWeightAveraging needs Lightning 2.6",
)
def test_averaged_weights_get_statistics_of_their_own(tmp_path):
    averaging = lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.5)
    (state,) = fit(tmp_path, Module(), averaging, PreciseBatchNorm()).validated
    assert_precise(state, chunks())
    assert not torch.equal(state["net.0.weight"], fit(tmp_path, Module()).net[0].weight)


class Anew:
    """Batches that begin anew."""

    def __iter__(self):
        return iter([[x, torch.zeros(BATCH_SIZE)] for x in chunks()])


class Once(Anew):
    """Batches that are gone when they have been taken."""

    def __init__(self):
        self.batches = super().__iter__()

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.batches)


def test_single_pass_iterators_are_not_consumed(tmp_path):
    with pytest.raises(MisconfigurationException, match="cannot iterate Once, which is an iterator"):
        fit(tmp_path, Module(Once()), PreciseBatchNorm())


def test_any_other_iterable_is_iterated_again(tmp_path):
    module = fit(tmp_path, Module(Anew()), PreciseBatchNorm())
    assert_precise(module.validated[0], chunks())


def test_an_error_ends_the_iteration_of_the_copy(tmp_path):
    class Ending(Anew):
        open = 0

        def __iter__(self):
            self.open += 1
            try:
                yield from super().__iter__()
            finally:
                self.open -= 1

    class Failing(Module):
        def precise_batch_norm_forward(self, batch):
            # Training is in the middle of its own.
            assert self.loader.open == 2
            raise KeyError

    module = Failing(Ending())
    with pytest.raises(KeyError) as caught:
        fit(tmp_path, module, PreciseBatchNorm(), val_check_interval=2)
    assert module.loader.open == 1, caught.value  # whose traceback holds on to what was not closed


def test_an_evaluation_after_a_failure_changes_nothing(tmp_path):
    class Failing(Module):
        def on_train_batch_end(self, *_):
            raise KeyError

    callback, module = PreciseBatchNorm(), Failing()
    with pytest.raises(KeyError):
        fit(tmp_path, module, callback)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(tmp_path, callbacks=[callback]).validate(module, verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_sampler_that_cannot_be_copied_raises(tmp_path):
    class Locked(RandomSampler):
        def __init__(self, data):
            super().__init__(data)
            self.lock = threading.Lock()

    loader = DataLoader(Noisy(), batch_size=BATCH_SIZE, sampler=Locked(Noisy()))
    with pytest.raises(MisconfigurationException, match=r"sampler Locked or .* cannot be copied"):
        fit(tmp_path, Module(loader), PreciseBatchNorm())


class Slow(Module):
    """Takes a while for a pass, so that bars are drawn."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not torch.is_grad_enabled() and self.trainer.training:
            time.sleep(0.11)
        return batch


@pytest.mark.parametrize("rate", [1, 0])
def test_shows_its_progress_beside_the_tqdm_bars_of_the_trainer(tmp_path, capsys, rate):
    fit(tmp_path, Slow(), TQDMProgressBar(rate), PreciseBatchNorm(2), enable_progress_bar=True)
    out = capsys.readouterr().out
    assert ("PreciseBatchNorm: 100%" in out) == ("| 2/2 [" in out) == bool(rate)


def test_shows_its_progress_among_the_rich_bars_of_the_trainer(tmp_path, capsys):
    class Kept(RichProgressBar):
        def on_train_end(self, *_):
            self.tasks = list(self.progress.tasks)

    bar = Kept(console_kwargs={"force_terminal": True})
    fit(tmp_path, Slow(), bar, PreciseBatchNorm(2), enable_progress_bar=True, max_epochs=2)
    ours = [task for task in bar.tasks if task.description == "PreciseBatchNorm"]
    assert [(task.completed, task.total, task.visible) for task in ours] == [(2, 2, False)] * 2
    assert "PreciseBatchNorm" in capsys.readouterr().out


def test_shows_nothing_without_a_progress_bar(tmp_path, capsys):
    fit(tmp_path, Module(), PreciseBatchNorm())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("num_batches", [0, -1, 1.5, True, None])
def test_a_number_of_batches_that_is_none_raises(num_batches):
    with pytest.raises(ValueError, match=f"num_batches must be an integer above 0, got {num_batches!r}"):
        PreciseBatchNorm(num_batches)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two ranks sees in a run."""
    folder = tmp_path_factory.mktemp("two_ranks")
    return once(lambda run: on_ranks(2, worker.train, run, folder))


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", worker.RUNS)
def test_every_rank_has_the_statistics_of_the_inputs_of_all_ranks(two_ranks, strategy):
    runs = two_ranks(strategy)
    data, last = Noisy().data, -worker.PASSES
    batches = [data[indices] for run in runs for indices in run["passed"][last:]]
    if strategy == "tensor parallel":  # the processes share their batches
        batches = batches[: worker.PASSES]
    if strategy == "synchronized":  # a layer normalizes by the batch of both
        batches = [torch.cat(pair) for pair in zip(batches[:last], batches[last:], strict=True)]
    for run in runs:
        # Lightning's FSDP is in single precision.
        exact = run["state"]["net.1.running_mean"].dtype == torch.float64
        state = {name: value.double() for name, value in run["state"].items()}
        assert_precise(state, batches, rtol=1e-12 if exact else 1e-5)
        assert not is_precise(state, batches[:-1])


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", worker.RUNS)
def test_every_process_runs_the_first_batches_of_its_share_in_the_epoch(two_ranks, strategy):
    for run in two_ranks(strategy):
        passes, epoch = worker.PASSES, len(run["trained"]) // worker.EPOCHS
        assert run["passed"] == run["trained"][:passes] + run["trained"][epoch : epoch + passes]
        assert run["trained"][:epoch] != run["trained"][epoch:]
