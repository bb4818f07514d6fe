"""The noise scale of runs with known gradients."""

import csv
from functools import partial

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_lars import LARS, GradientNoiseScale
from tests.support.boring import Boring, WithoutOptimizer, boring, trainer
from tests.support.ranks import on_ranks, once
from tests.workers.noise_scale import (
    B_SIMPLE,
    CLOSED_FORM,
    SQUARED_GRADIENT,
    TR_SIGMA,
    Linear,
    Module,
    expected,
    measure,
    samples,
)

PREFIX = "gradient_noise_scale/"


def fit(tmp_path, module, *, every_n_steps=1, accumulate=2, callbacks=(), **options):
    """Train, and return the callback with what the Trainer's metrics hold in the end."""
    ours = GradientNoiseScale(every_n_steps)
    options = {"accumulate_grad_batches": accumulate, "callbacks": [*callbacks, ours], **options}
    fitting = trainer(tmp_path, **options)
    fitting.fit(module)
    metrics = {key: value.item() for key, value in fitting.callback_metrics.items()}
    return ours, {key.removeprefix(PREFIX): value for key, value in metrics.items() if PREFIX in key}


def micro_batches(number, size=4, data=None):
    """The samples of each step of ``number`` micro-batches, in order."""
    data = samples(64) if data is None else data
    batches = [data[i : i + size] for i in range(0, len(data), size)]
    return [batches[i : i + number] for i in range(0, len(batches), number)]


def assert_measured(metrics, steps, rel=1e-9):
    for key, value in expected(steps).items():
        assert metrics[key] == pytest.approx(value, rel=1e-6 if rel < 1e-6 else rel), key


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_matches_the_gradients_of_micro_batches_and_steps(tmp_path, accumulate):
    _, metrics = fit(tmp_path, Module(), accumulate=accumulate)
    assert_measured(metrics, micro_batches(accumulate))
    if "B_simple" in metrics:
        assert metrics["batch_size_to_B_simple"] == pytest.approx(4 * accumulate / metrics["B_simple"])


def test_agrees_with_the_closed_form_within_its_stated_error_and_interprets_it(tmp_path, caplog):
    with caplog.at_level("INFO"):
        _, metrics = fit(tmp_path, Module(**CLOSED_FORM), accumulate=4)
    assert "GradientNoiseScale: the effective batch size 32 is" in caplog.text
    error = metrics["B_simple_standard_error"]
    assert abs(metrics["B_simple"] - B_SIMPLE) < 3 * error < B_SIMPLE
    assert metrics["tr_sigma"] == pytest.approx(TR_SIGMA, rel=0.1)
    assert metrics["squared_gradient"] == pytest.approx(SQUARED_GRADIENT, rel=0.5)


def test_measures_one_step_in_so_many(tmp_path):
    _, metrics = fit(tmp_path, Module(), every_n_steps=3)
    assert_measured(metrics, micro_batches(2)[::3])


def test_steps_with_a_single_or_a_short_micro_batch_are_skipped(tmp_path):
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
    data = samples(30)  # 7 batches of 4, and one of 2
    _, metrics = fit(
        tmp_path, Module(data), accumulate=1, callbacks=[scheduler], max_epochs=2, num_sanity_val_steps=0
    )
    assert_measured(metrics, micro_batches(2, data=data)[:3])


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_clipping_does_not_change_it(tmp_path, clip):
    _, metrics = fit(tmp_path, Module(), gradient_clip_val=clip)
    assert_measured(metrics, micro_batches(2))


class Spoiled(Module):
    """One batch whose gradient is not finite."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 5 else 1.0)


def test_a_non_finite_gradient_is_skipped(tmp_path):
    _, metrics = fit(tmp_path, Spoiled())
    steps = micro_batches(2)
    assert_measured(metrics, [*steps[:2], *steps[3:]])


def test_gradients_are_unscaled_in_mixed_precision_and_overflowing_steps_skipped(tmp_path):
    class Overflows(Module):
        def __init__(self):
            super().__init__(torch.as_tensor(samples(64)).float())
            self.w, self.v = (nn.Parameter(p.detach().float()) for p in (self.w, self.v))

        def training_step(self, batch, batch_idx):
            return (batch[:, :3] @ self.w + batch[:, 3:] @ self.v).mean() * (1e38 if batch_idx == 5 else 1.0)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    _, metrics = fit(tmp_path, Overflows(), plugins=plugin)
    assert scaler.get_scale() == 2.0**9
    steps = micro_batches(2)
    # The products are computed in half precision.
    for key, value in expected([*steps[:2], *steps[3:]]).items():
        assert metrics[key] == pytest.approx(value, rel=0.02), key


@pytest.mark.parametrize("accumulate", [2, 4])
def test_training_is_unaffected(tmp_path, accumulate):
    weights = []
    for callbacks in ([], [GradientNoiseScale(every_n_steps=2)]):
        model = boring()
        trainer(tmp_path, accumulate_grad_batches=accumulate, callbacks=callbacks, max_epochs=3).fit(model)
        weights.append(model.state_dict())
        assert not any(p._backward_hooks for p in model.parameters())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_loggers_get_it_when_lightning_logs(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, Module(), logger=logger, log_every_n_steps=3)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row[PREFIX + "tr_sigma"]]
    assert [int(row["step"]) for row in rows] == [2, 5]
    for row, steps in zip(rows, (3, 6), strict=True):
        wanted = expected(micro_batches(2)[:steps])["tr_sigma"]
        assert float(row[PREFIX + "tr_sigma"]) == pytest.approx(wanted, rel=1e-6)


def test_a_resumed_run_continues_measuring(tmp_path):
    whole, _ = fit(tmp_path, Module(), max_epochs=2)
    half = trainer(tmp_path, accumulate_grad_batches=2, callbacks=[GradientNoiseScale(1)])
    half.fit(Module())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = GradientNoiseScale(1)
    trainer(tmp_path, accumulate_grad_batches=2, callbacks=[resumed], max_epochs=2).fit(
        Module(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda each: each.__name__)
@pytest.mark.parametrize("options", [{}, {"barebones": True}, {"fast_dev_run": 4}], ids=str)
def test_works_in_the_trainer_of_both_packages(tmp_path, package, options):
    module = type("Module", (Linear, package.LightningModule), {})()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    fitting = package.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[GradientNoiseScale(every_n_steps=1)],
        **({} if options.get("barebones") else {"logger": False, "default_root_dir": tmp_path, **quiet}),
        **options,
    )
    fitting.fit(module)
    assert fitting.callback_metrics[PREFIX + "tr_sigma"] > 0


def test_gradients_that_are_zero_have_no_noise_scale(tmp_path):
    _, metrics = fit(tmp_path, Module(np.zeros((32, 4))))
    assert metrics == {"tr_sigma": 0.0, "squared_gradient": 0.0}


def test_a_run_without_a_measurement_warns(tmp_path):
    with pytest.warns(UserWarning, match="measured no step"):
        fit(tmp_path, Module(samples(6), batch_size=4))


def test_steps_that_bypass_lightning_are_named_as_a_reason(tmp_path):
    class RoundLightning(Module):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer.optimizer.step(optimizer_closure)

    with pytest.warns(UserWarning, match=r"measured no step.*takes the step: .*not of optimizer\.optimizer"):
        fit(tmp_path, RoundLightning(samples(32), batch_size=4))


def test_one_rank_without_accumulation_says_what_to_do(tmp_path):
    with pytest.raises(MisconfigurationException, match="set accumulate_grad_batches=2"):
        fit(tmp_path, Module(), accumulate=1)


def test_manual_optimization_says_what_to_do(tmp_path):
    class Manual(Boring):
        automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="in manual optimization"):
        fit(tmp_path, Manual(optimizer=partial(torch.optim.SGD, lr=0.1)), accumulate=1)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_without_an_optimizer_says_what_to_do(tmp_path):
    with pytest.raises(MisconfigurationException, match="no optimizer: return one"):
        fit(tmp_path, WithoutOptimizer(optimizer=LARS))


@pytest.mark.parametrize(
    "arguments",
    [{"every_n_steps": 0}, {"every_n_steps": 1.5}, {"decay": 1.0}, {"decay": -0.1}, {"batch_size": 0}],
    ids=str,
)
def test_arguments_that_break_their_rule_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        GradientNoiseScale(**arguments)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two ranks sees in a run."""
    folder = tmp_path_factory.mktemp("noise")
    return once(lambda run: on_ranks(2, measure, run, folder))


def shares(accumulated=1, data=None):
    """The steps of two processes, which take every second sample."""
    data = samples(64) if data is None else data
    of_ranks = [micro_batches(accumulated, data=data[rank::2]) for rank in range(2)]
    return [[*first, *second] for first, second in zip(*of_ranks, strict=True)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("run", "accumulated"), [("ddp", 1), ("ddp, bucket views", 1), ("ddp, accumulated", 2)]
)
def test_ddp_compares_the_gradients_of_ranks(two_ranks, run, accumulated):
    for seen in two_ranks(run):
        assert seen["error"] is None
        metrics = {key.removeprefix(PREFIX): value for key, value in seen["metrics"].items()}
        assert_measured(metrics, shares(accumulated))


@pytest.mark.distributed
def test_ddp_agrees_with_the_closed_form(two_ranks):
    for seen in two_ranks("ddp, closed form"):
        metrics = {k.removeprefix(PREFIX): v for k, v in seen["metrics"].items()}
        assert abs(metrics["B_simple"] - B_SIMPLE) < 3 * metrics["B_simple_standard_error"] < B_SIMPLE


@pytest.mark.distributed
def test_all_ranks_skip_the_same_steps(two_ranks):
    first, second = two_ranks("ddp, uneven")
    assert first["state"] == second["state"]
    metrics = {key.removeprefix(PREFIX): value for key, value in first["metrics"].items()}
    assert_measured(metrics, shares()[:3])


@pytest.mark.distributed
def test_gradients_that_a_communication_hook_does_not_average_are_not_measured(two_ranks):
    for seen in two_ranks("ddp, not reduced"):
        assert seen["metrics"] == {}


@pytest.mark.distributed
@pytest.mark.parametrize(("run", "strategy"), [("fsdp", "FSDP"), ("fsdp2", "ModelParallelStrategy")])
def test_strategies_that_hide_the_gradient_of_a_process_are_refused(two_ranks, run, strategy):
    for seen in two_ranks(run):
        assert strategy in seen["error"]
        assert "measure in a shorter run with strategy='ddp'" in seen["error"]
