"""What the monitor logs, when, and at what cost."""

import csv
import warnings
from functools import partial
from pathlib import Path
from statistics import mean, median

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import MixedPrecision
from matplotlib import pyplot
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lars import (
    LAMB,
    LARS,
    BatchSizeScaling,
    LearningRateWarmup,
    NovoGrad,
    TrustRatioMonitor,
    WarmupDecayLR,
    build_optimizer,
)
from tests.support.boring import LARS_WITH_DECAY, Boring, LogsLoss, Plain, WithoutOptimizer, boring, trainer
from tests.support.heatmap import cells

LAYERS = ["net.0.bias", "net.0.weight", "net.2.bias", "net.2.weight"]


class Spy(Callback):
    """Keeps the trust ratios after every batch, by the step that Lightning logs them under."""

    def __init__(self):
        self.ratios = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        ratios = trainer.optimizers[0].trust_ratios()
        self.ratios[trainer.global_step - 1] = {name: ratio.item() for name, ratio in ratios.items()}


class CountHostReads(TorchDispatchMode):
    """Counts what forces the host to wait for the device."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Unlogged(LightningModule):
    """A module that logs nothing, as barebones demands."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))

    def training_step(self, batch, batch_idx):
        return self.net(batch).pow(2).mean()

    train_dataloader = Boring.train_dataloader

    def configure_optimizers(self):
        return build_optimizer(self, LARS, lr=1.0)


def logged(logger):
    """Rows of a CSVLogger that hold trust ratios, by step."""
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = {}
        for row in csv.DictReader(file):
            values = {
                k: float(v)
                for k, v in row.items()
                if k.startswith(("trust_ratio", "effective_lr", "update_to")) and v
            }
            if values:
                assert int(row["step"]) not in rows
                rows[int(row["step"])] = values
        return rows


@pytest.mark.parametrize("optimizer", [partial(LARS, lr=1.0, weight_decay=0.1), LAMB])
def test_logs_the_ratio_that_each_layer_used(tmp_path, optimizer):
    logger, spy = CSVLogger(tmp_path), Spy()
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[TrustRatioMonitor("*"), spy]).fit(
        boring(optimizer, exclude_bias=False)
    )
    rows = logged(logger)
    assert sorted(rows) == list(range(8))
    for step, row in rows.items():
        ratios = spy.ratios[step]
        assert {
            f"trust_ratio_per_layer/{name}": ratio for name, ratio in ratios.items()
        }.items() <= row.items()
        assert sorted(ratios) == LAYERS
        assert row["trust_ratio/min"] == min(ratios.values())
        assert row["trust_ratio/max"] == max(ratios.values())
        assert row["trust_ratio/median"] == pytest.approx(median(ratios.values()), rel=1e-6)


def test_logs_the_factors_of_novograd(tmp_path):
    logger, spy = CSVLogger(tmp_path), Spy()
    monitor = TrustRatioMonitor("*")
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[monitor, spy]).fit(boring(NovoGrad))
    for step, row in logged(logger).items():
        ratios = {f"trust_ratio_per_layer/{name}": ratio for name, ratio in spy.ratios[step].items()}
        assert ratios
        assert ratios.items() <= row.items()


def test_logs_on_the_steps_on_which_lightning_logs(tmp_path):
    class Both(LogsLoss, Boring):
        pass

    logger = CSVLogger(tmp_path)
    fit = trainer(tmp_path, logger=logger, log_every_n_steps=3, callbacks=[TrustRatioMonitor()])
    fit.fit(Both(optimizer=LARS_WITH_DECAY))
    with open(f"{logger.log_dir}/metrics.csv") as file:
        losses = {int(row["step"]) for row in csv.DictReader(file) if row["loss"]}
    assert sorted(logged(logger)) == sorted(losses) == [2, 5]


@pytest.mark.parametrize(("every", "steps"), [(1, [[0], [1], [2], [3]]), (2, [[0, 1], [2, 3]])])
def test_logs_once_for_an_accumulated_step(tmp_path, every, steps):
    logger, spy = CSVLogger(tmp_path), Spy()
    trainer(
        tmp_path,
        logger=logger,
        log_every_n_steps=every,
        accumulate_grad_batches=2,
        callbacks=[TrustRatioMonitor("net.0.weight"), spy],
    ).fit(boring())
    rows = logged(logger)
    assert sorted(rows) == [since_last[-1] for since_last in steps]
    for since_last, row in zip(steps, rows.values(), strict=True):
        ratios = [spy.ratios[step]["net.0.weight"] for step in since_last]
        assert row["trust_ratio_per_layer/net.0.weight"] == pytest.approx(mean(ratios), rel=1e-6)


def test_logs_mean_smallest_and_largest_of_the_steps_since_the_last_log(tmp_path):
    logger, spy = CSVLogger(tmp_path), Spy()
    trainer(
        tmp_path, logger=logger, log_every_n_steps=4, callbacks=[TrustRatioMonitor("net.*.weight"), spy]
    ).fit(boring())
    for step, row in logged(logger).items():
        since_last = [spy.ratios[number] for number in range(step - 3, step + 1)]
        means = {name: mean(ratios[name] for ratios in since_last) for name in since_last[0]}
        for name, expected in means.items():
            assert row[f"trust_ratio_per_layer/{name}"] == pytest.approx(expected, rel=1e-6)
        assert row["trust_ratio/median"] == pytest.approx(median(means.values()), rel=1e-6)
        assert row["trust_ratio/min"] == min(min(ratios.values()) for ratios in since_last)
        assert row["trust_ratio/max"] == max(max(ratios.values()) for ratios in since_last)


class Weights(Callback):
    """Keeps the weights before and after every step, in float64."""

    def __init__(self):
        self.changes = []

    def copy(self, pl_module):
        return {name: p.detach().double().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.before = self.copy(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        after = self.copy(pl_module)
        self.changes.append(
            {n: ((after[n] - w).norm() / after[n].norm()).item() for n, w in self.before.items()}
        )


@pytest.mark.parametrize("order", [1, -1], ids=["monitor last", "monitor first"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_logs_the_learning_rate_inside_the_step(tmp_path, order, tensor_lr):
    logger, spy, weights = CSVLogger(tmp_path), Spy(), Weights()
    callbacks = [BatchSizeScaling(1), LearningRateWarmup(4), TrustRatioMonitor("*")]
    lr = torch.tensor(0.2) if tensor_lr else 0.2
    trainer(tmp_path, logger=logger, log_every_n_steps=2, callbacks=[*callbacks[::order], spy, weights]).fit(
        boring(partial(LARS, lr=lr, trust_coefficient=0.1))
    )
    for step, row in logged(logger).items():
        for name in ("net.0.weight", "net.2.weight"):
            effective = [
                spy.ratios[number][name] * 0.2 * 4 * min(1, (number + 1) / 4) for number in (step - 1, step)
            ]
            assert row[f"effective_lr_per_layer/{name}"] == pytest.approx(mean(effective), rel=1e-5)
            # Measured in the step that is logged alone, as it takes a copy of the weights.
            measured = row[f"update_to_weight_per_layer/{name}"]
            assert measured == pytest.approx(weights.changes[step][name], rel=1e-4)
        updates = [weights.changes[step][name] for name in ("net.0.weight", "net.2.weight")]
        assert row["update_to_weight/max"] == pytest.approx(max(updates), rel=1e-4)


def test_updates_are_not_measured_unless_requested(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = TrustRatioMonitor("*", update_to_weight=False)
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[monitor]).fit(boring())
    assert "update_to_weight" not in Path(f"{logger.log_dir}/metrics.csv").read_text()


def test_logs_the_share_of_layers_that_the_clip_or_the_zero_rule_decided(tmp_path):
    class ZeroHead(Boring):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            nn.init.zeros_(self.net[2].weight)

    logger = CSVLogger(tmp_path)
    optimizer = partial(LARS, lr=1.0, trust_clip=0.5)
    trainer(tmp_path, logger=logger, log_every_n_steps=1, max_steps=1, callbacks=[TrustRatioMonitor()]).fit(
        ZeroHead(optimizer=optimizer)
    )
    # The gradients of the first layer come through the head, which is zero.
    assert logged(logger)[0]["trust_ratio/at_zero_rule"] == 1.0
    assert logged(logger)[0]["trust_ratio/at_trust_clip"] == 1.0
    assert logged(logger)[0]["trust_ratio/max"] == 0.5


def test_by_default_no_layer_has_a_separate_column(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[TrustRatioMonitor()]).fit(boring())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        columns = csv.DictReader(file).fieldnames
    assert "trust_ratio/median" in columns
    assert not any("per_layer" in column for column in columns)


def test_a_pattern_that_matches_no_layer_names_the_closest(tmp_path):
    fit = trainer(
        tmp_path, logger=CSVLogger(tmp_path), callbacks=[TrustRatioMonitor(["net.2.*", "net.9.weight"])]
    )
    with pytest.raises(
        ValueError, match=r"layers must match.*'net.9.weight'; the closest are 'net.\d.weight'"
    ):
        fit.fit(boring())


@pytest.mark.parametrize("layers", [3, [1], None])
def test_layers_that_are_no_patterns_are_refused(layers):
    with pytest.raises(ValueError, match="layers must be patterns over parameter names, got"):
        TrustRatioMonitor(layers)


def test_tensorboard_gets_histograms_of_all_layers(tmp_path):
    logger, spy = TensorBoardLogger(tmp_path), Spy()
    trainer(tmp_path, logger=logger, log_every_n_steps=4, callbacks=[TrustRatioMonitor(), spy]).fit(boring())
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    for quantity in ("trust_ratio", "effective_lr", "update_to_weight"):
        histograms = events.Histograms(f"{quantity}_per_layer/all")
        assert [event.step for event in histograms] == [3, 7]
        assert all(event.histogram_value.num == 2 for event in histograms)


@pytest.mark.parametrize("joined_by", ["-", "."])
def test_histograms_of_tensorboard_have_the_prefix_of_the_logger_as_numbers_have(tmp_path, joined_by):
    class Joining(TensorBoardLogger):
        LOGGER_JOIN_CHAR = joined_by

    logger = Joining(tmp_path, prefix="run3")
    trainer(tmp_path, logger=logger, log_every_n_steps=4, callbacks=[TrustRatioMonitor()]).fit(boring())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = events.Tags()
    assert len(tags["histograms"]) == 3
    assert all(tag.startswith(f"run3{joined_by}") for tag in tags["histograms"])
    assert f"run3{joined_by}trust_ratio/median" in tags["scalars"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_weights_and_biases_gets_summary_and_histograms(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger, spy = WandbLogger(save_dir=tmp_path, offline=True, prefix="run3"), Spy()
    trainer(tmp_path, logger=logger, log_every_n_steps=4, callbacks=[TrustRatioMonitor(), spy]).fit(boring())
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["run3-trust_ratio/max"] == pytest.approx(
        max(ratio for step in range(4, 8) for ratio in spy.ratios[step].values()), rel=1e-6
    )
    assert sum(summary["run3-trust_ratio_per_layer/all"]["values"]) == 2
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


class Own(torch.optim.SGD):
    """An optimizer whose ratios are not those of parameters."""

    def trust_ratios(self):
        return {"all of it": torch.tensor(0.25)}


def test_a_third_party_optimizer_is_logged_by_its_own_names(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[TrustRatioMonitor()]).fit(
        boring(partial(Own, lr=0.1))
    )
    rows = logged(logger)
    assert sorted(rows) == list(range(8))
    assert all(row["trust_ratio/max"] == 0.25 for row in rows.values())


def test_layers_that_an_optimizer_numbers_are_named_as_in_the_module(tmp_path):
    class Unnamed(Boring):
        def configure_optimizers(self):
            return LARS(self.parameters(), lr=1.0, weight_decay=0.1)

    logger, monitor = CSVLogger(tmp_path), TrustRatioMonitor("net.0.*", alerts=False)
    trainer(tmp_path, logger=logger, log_every_n_steps=1, max_steps=2, callbacks=[monitor]).fit(
        Unnamed(optimizer=LARS)
    )
    for row in logged(logger).values():
        named = {key for key in row if key.startswith("trust_ratio_per_layer")}
        assert named == {"trust_ratio_per_layer/net.0.weight", "trust_ratio_per_layer/net.0.bias"}
        assert 0 <= row["trust_ratio/at_zero_rule"] < 1
    layers = [f"net.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    assert list(monitor._history.series("trust_ratio")) == layers
    assert list(monitor._history.statistics["at_trust_clip"]) == layers


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist within another group")
def test_unfrozen_layers_that_are_added_without_names_are_named_as_in_the_module(tmp_path):
    class Tuned(Unlogged):
        def __init__(self):
            super().__init__()
            self.backbone, self.net = self.net[0], self.net[1]

        def training_step(self, batch, batch_idx):
            return self.net(self.backbone(batch)).pow(2).mean()

    logger = CSVLogger(tmp_path)
    fit = trainer(
        tmp_path,
        logger=logger,
        log_every_n_steps=8,
        max_epochs=2,
        callbacks=[BackboneFinetuning(1), TrustRatioMonitor("backbone.*")],
    )
    fit.fit(Tuned())
    before, after = logged(logger).values()
    assert not any("backbone" in key for key in before)
    assert "trust_ratio_per_layer/backbone.weight" in after


def test_an_optimizer_that_adapts_no_layer_warns(tmp_path):
    class Plain(Unlogged):
        def configure_optimizers(self):
            return build_optimizer(self, LARS, lr=1.0, exclude="*")

    fit = trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[TrustRatioMonitor("*")])
    with pytest.warns(UserWarning, match=r"nothing to log: \['LARS'\] hold no adapted layer"):
        fit.fit(Plain())


def test_a_run_resumed_after_its_peak_does_not_report_a_negligible_rate(tmp_path):
    class Decaying(Boring):
        def configure_optimizers(self):
            optimizer = build_optimizer(self, LARS, lr=2.0, excluded_lr=0.1)
            decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def fit(epochs, **options):
        run = trainer(
            tmp_path,
            logger=CSVLogger(tmp_path),
            log_every_n_steps=1,
            max_epochs=epochs,
            callbacks=[TrustRatioMonitor()],
        )
        run.fit(Decaying(optimizer=LARS), **options)
        return run

    fit(1).save_checkpoint(tmp_path / "half.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(2, ckpt_path=tmp_path / "half.ckpt")
    assert not any("at its peak" in str(warning.message) for warning in caught)


def test_two_monitors_log_side_by_side(tmp_path):
    logger = CSVLogger(tmp_path)
    monitors = [TrustRatioMonitor("net.0.*"), TrustRatioMonitor("net.2.*")]
    trainer(tmp_path, logger=logger, log_every_n_steps=4, callbacks=monitors).fit(boring())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        columns = csv.DictReader(file).fieldnames
    assert {"trust_ratio_per_layer/net.0.weight", "trust_ratio_per_layer/net.2.weight"} <= set(columns)


def test_a_learning_rate_for_sgd_warns_once_that_it_is_negligible(tmp_path):
    callbacks = [TrustRatioMonitor(), LearningRateWarmup(3)]
    fit = trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1, callbacks=callbacks)
    with pytest.warns(UserWarning, match=r"trust_coefficient \* lr is 0.0001 at its peak") as caught:
        fit.fit(boring(partial(LARS, lr=0.1)))
    assert sum("at its peak" in str(warning.message) for warning in caught) == 1
    silent = trainer(
        tmp_path / "2",
        logger=CSVLogger(tmp_path / "2"),
        log_every_n_steps=1,
        callbacks=[TrustRatioMonitor(alerts=False)],
    )
    silent.fit(boring(partial(LARS, lr=0.1)))


def test_a_negligible_tensor_learning_rate_is_reported_too(tmp_path):
    fit = trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1, callbacks=[TrustRatioMonitor()])
    with pytest.warns(UserWarning, match=r"trust_coefficient \* lr is 0.0001 at its peak"):
        fit.fit(boring(partial(LARS, lr=torch.tensor(0.1))))


ENOUGH = {
    "README": (3.2, {"warmup_steps": 2}, {}),
    "default": (1.0, {"warmup_steps": 0}, {"log_every_n_steps": 3}),
    "warmup between two logs": (1.0, {"warmup_steps": 3}, {"log_every_n_steps": 6}),
    "ends inside its warmup": (1.0, {"warmup_steps": 80}, {"log_every_n_steps": 1}),
    "ends inside a constant warmup": (
        1.0,
        {"warmup_steps": 80, "warmup": "constant", "start_factor": 0.01},
        {"log_every_n_steps": 1},
    ),
    "fast_dev_run": (0.1, {"warmup_steps": 0}, {"fast_dev_run": 3}),
}


@pytest.mark.parametrize("case", ENOUGH)
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_learning_rate_that_is_large_enough_at_its_peak_or_before_it_is_not_warned_of(tmp_path, case):
    lr, schedule, options = ENOUGH[case]
    if "ends" in case:
        schedule = {**schedule, "total_steps": 100}
    fit = trainer(tmp_path, **{"logger": CSVLogger(tmp_path), "callbacks": [TrustRatioMonitor()], **options})
    # warnings are errors
    schedule = partial(WarmupDecayLR, **schedule)
    fit.fit(boring(partial(LARS, lr=lr), lr_scheduler=schedule, excluded_lr=0.1))
    assert fit.global_step == options.get("fast_dev_run", 8)


def test_a_peak_between_two_logs_counts(tmp_path):
    fit = trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=4, callbacks=[TrustRatioMonitor()])
    schedule = partial(WarmupDecayLR, warmup_steps=2, decay="polynomial", power=4)
    with pytest.warns(UserWarning, match=r"trust_coefficient \* lr is 0.0004 at its peak"):
        fit.fit(boring(partial(LARS, lr=0.4), lr_scheduler=schedule))


def test_the_learning_rate_of_sgd_is_not_negligible_for_larc(tmp_path):
    fit = trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1, callbacks=[TrustRatioMonitor()])
    fit.fit(boring(partial(LARS, lr=0.1, trust_clip="larc")))  # warnings are errors
    assert fit.callback_metrics["update_to_weight/max"] > 5e-4


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_warns_of_steps_after_the_last_log(tmp_path):
    class Failing(Boring):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (torch.nan if batch_idx == 7 else 1)

    fit = trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[TrustRatioMonitor()])
    with pytest.warns(UserWarning, match="trust ratios that are not finite"):
        fit.fit(Failing(optimizer=LARS))


def test_every_logger_of_the_trainer_gets_the_same(tmp_path):
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tensorboard")]
    trainer(tmp_path, logger=loggers, log_every_n_steps=4, callbacks=[TrustRatioMonitor()]).fit(boring())
    events = EventAccumulator(loggers[1].log_dir)
    events.Reload()
    for step, row in logged(loggers[0]).items():
        for key, value in row.items():
            (event,) = [event for event in events.Scalars(key) if event.step == step]
            assert event.value == pytest.approx(value, rel=1e-6)


def test_summary_can_be_monitored(tmp_path):
    stopping = EarlyStopping(
        "trust_ratio/max", mode="min", divergence_threshold=0.0, check_on_train_epoch_end=True
    )
    fit = trainer(
        tmp_path,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        max_epochs=3,
        callbacks=[TrustRatioMonitor(), stopping],
    )
    fit.fit(boring())
    assert fit.current_epoch == 1
    assert {"trust_ratio/min", "trust_ratio/median", "trust_ratio/max"} <= fit.callback_metrics.keys()


def test_a_step_that_the_scaler_skipped_leaves_nothing(tmp_path):
    class Overflowing(Boring):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx in (2, 5) else 1.0)

    logger = CSVLogger(tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    fit = trainer(
        tmp_path,
        logger=logger,
        log_every_n_steps=1,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        callbacks=[TrustRatioMonitor()],
    )
    fit.fit(Overflowing(optimizer=partial(LARS, lr=1.0)))
    assert sorted(logged(logger)) == [0, 1, 3, 4, 6, 7]


def test_no_value_is_copied_to_the_host(tmp_path):
    """All come in one tensor. Against the same run without the monitor: Lightning reads the loss."""

    def reads(log_every_n_steps, callbacks):
        with CountHostReads() as counter:
            trainer(
                tmp_path,
                logger=CSVLogger(tmp_path),
                log_every_n_steps=log_every_n_steps,
                max_steps=8,
                callbacks=callbacks,
            ).fit(boring())
        return counter.reads

    for every in (100, 4, 1):
        assert reads(every, [TrustRatioMonitor("*")]) == reads(every, [])
    assert reads(1, []) > 0


def test_two_optimizers_are_distinguished(tmp_path):
    class TwoOptimizers(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

        def configure_optimizers(self):
            return build_optimizer(self.left, LARS, lr=1.0), build_optimizer(self.right, LARS, lr=1.0)

        def training_step(self, batch, batch_idx):
            for module, optimizer in zip((self.left, self.right), self.optimizers(), strict=True):
                if module is self.left or batch_idx % 2:
                    optimizer.zero_grad()
                    self.manual_backward(module(batch).pow(2).mean())
                    optimizer.step()

        train_dataloader = Boring.train_dataloader

    logger = CSVLogger(tmp_path)
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[TrustRatioMonitor("*")]).fit(
        TwoOptimizers()
    )
    rows = logged(logger)
    assert "trust_ratio_per_layer/LARS/weight" in rows[1]
    assert "trust_ratio_per_layer/LARS-1/weight" in rows[1]
    assert [any("LARS-1" in key for key in rows[batch]) for batch in range(8)] == [False, True] * 4


def test_an_optimizer_that_rarely_steps_is_logged_with_its_last_step(tmp_path):
    class Rare(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = nn.Linear(4, 2)

        def configure_optimizers(self):
            return build_optimizer(self.net, LARS, lr=1.0)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self.net(batch).pow(2).mean())
            if batch_idx % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()

        train_dataloader = Boring.train_dataloader

    logger, spy = CSVLogger(tmp_path), Spy()
    trainer(tmp_path, logger=logger, log_every_n_steps=2, callbacks=[spy, TrustRatioMonitor("*")]).fit(Rare())
    rows = logged(logger)
    assert sorted(rows) == [1, 3, 7]
    assert [row["trust_ratio_per_layer/weight"] for row in rows.values()] == [
        spy.ratios[step]["weight"] for step in range(3)
    ]


def test_a_second_fit_logs_every_step_once(tmp_path):
    monitor, logger = TrustRatioMonitor(), CSVLogger(tmp_path)
    fit = trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[monitor])
    module = boring()
    fit.fit(module)
    fit.fit_loop.max_epochs = 2
    fit.fit(module)
    assert len(module.trainer.optimizers[0]._optimizer_step_post_hooks) == 0
    assert sorted(logged(logger)) == list(range(16))


def test_an_exception_leaves_no_hook_behind(tmp_path):
    class Failing(Boring):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    module = Failing(optimizer=partial(LARS, lr=1.0))
    fit = trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[TrustRatioMonitor()])
    with pytest.raises(RuntimeError, match="out of luck"):
        fit.fit(module)
    assert not fit.optimizers[0]._optimizer_step_post_hooks


def test_without_a_logger_says_what_to_do(tmp_path):
    with pytest.raises(MisconfigurationException, match="nowhere to log to: give the Trainer a logger"):
        trainer(tmp_path, callbacks=[TrustRatioMonitor()]).fit(boring())


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_without_an_optimizer_says_what_to_do(tmp_path):
    fit = trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[TrustRatioMonitor()])
    with pytest.raises(MisconfigurationException, match=r"torch.optim optimizer, got none: return one"):
        fit.fit(WithoutOptimizer(optimizer=LARS))


def test_fast_dev_run_works(tmp_path):
    fit = trainer(tmp_path, fast_dev_run=2, logger=CSVLogger(tmp_path), callbacks=[TrustRatioMonitor()])
    fit.fit(boring())
    assert fit.global_step == 2


def drawn(monitor):
    """The heat-map, as it is in the picture."""
    _, (above, _) = monitor.plot()
    return cells(above.collections[0])


def test_plot_draws_the_ratios_that_were_logged(tmp_path):
    logger, monitor = CSVLogger(tmp_path), TrustRatioMonitor("*")
    trainer(tmp_path, logger=logger, log_every_n_steps=2, callbacks=[monitor]).fit(boring())
    rows = logged(logger)
    expected = [
        [row[f"trust_ratio_per_layer/{name}"] for row in rows.values()]
        for name in ("net.0.weight", "net.2.weight")
    ]
    assert drawn(monitor).tolist() == [pytest.approx(row) for row in expected]
    _, (above, below) = monitor.plot()
    assert above.get_xlim() == (0, 8)
    assert below.get_lines()[0].get_xdata().tolist() == [2, 4, 6, 8]
    given = above.get_figure().subplots()
    assert monitor.plot(given) == (above.get_figure(), given)


def test_plot_is_displayed_by_a_notebook_when_a_cell_ends(tmp_path):
    monitor = TrustRatioMonitor()
    trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1, callbacks=[monitor]).fit(boring())
    figure, _ = monitor.plot()
    assert [pyplot.figure(number) for number in pyplot.get_fignums()] == [figure]
    monitor.plot(pyplot.subplots()[1])
    assert len(pyplot.get_fignums()) == 2


def test_plot_without_records_lists_possible_reasons():
    with pytest.raises(
        ValueError, match=r"in this process\. Either no run has reached its first log"
    ) as raised:
        TrustRatioMonitor().plot()
    # Their processes have ended, and this one cannot know that they were there.
    assert "in separate processes (strategy='ddp_notebook', " in str(raised.value)
    assert "TrustRatioMonitor(picture=...) saves a plot to a file" in str(raised.value)


def test_a_third_party_optimizer_is_plotted_without_a_learning_rate(tmp_path):
    monitor = TrustRatioMonitor(picture=tmp_path / "picture.png")
    trainer(tmp_path, log_every_n_steps=1, callbacks=[monitor]).fit(boring(partial(Own, lr=0.1)))
    _, axes = monitor.plot()
    assert [ax.get_title("left") for ax in axes] == ["Trust ratio"]
    assert (tmp_path / "picture.png").stat().st_size


def test_steps_after_the_last_log_are_in_the_plot_too(tmp_path):
    monitor = TrustRatioMonitor()
    trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=3, callbacks=[monitor]).fit(boring())
    _, (_, below) = monitor.plot()
    assert below.get_lines()[0].get_xdata().tolist() == [3, 6, 8]


def test_plot_and_table_appear_when_training_ends(tmp_path, capsys):
    logger = CSVLogger(tmp_path)
    monitor = TrustRatioMonitor(picture="ratios/trust.png", table=True)
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[monitor]).fit(boring())
    assert (Path(logger.log_dir) / "ratios" / "trust.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.startswith("Trust ratios\n")
    assert "net.0.weight" in out
    assert "net.1.weight" not in out


def test_plot_and_table_need_no_logger(tmp_path, capsys):
    monitor = TrustRatioMonitor(picture=tmp_path / "trust.svg", table=True)
    trainer(tmp_path, logger=False, callbacks=[monitor]).fit(boring())
    assert (tmp_path / "trust.svg").exists()
    assert "net.2.weight" in capsys.readouterr().out


def test_a_failed_run_still_saves_its_plot(tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                raise RuntimeError("lost")

    monitor = TrustRatioMonitor(picture="trust.png")
    with pytest.raises(RuntimeError, match="lost"):
        trainer(tmp_path, log_every_n_steps=1, callbacks=[monitor, Fails()]).fit(boring())
    assert (tmp_path / "trust.png").exists()
    assert drawn(monitor).shape == (2, 6)


def test_a_plot_that_cannot_be_saved_does_not_end_the_run(tmp_path):
    (tmp_path / "file").write_text("in the way")
    monitor = TrustRatioMonitor(picture="file/trust.png")
    with pytest.warns(UserWarning, match=r"could not save its plot .*file/trust\.png"):
        trainer(tmp_path, enable_checkpointing=True, callbacks=[monitor]).fit(boring())
    assert list(tmp_path.rglob("*.ckpt"))


def test_the_plot_of_a_resumed_run_equals_that_of_an_uninterrupted_one(tmp_path):
    def fit(epochs, **resume):
        monitor = TrustRatioMonitor(picture="trust.png")
        fitting = trainer(tmp_path, log_every_n_steps=2, max_epochs=epochs, callbacks=[monitor])
        fitting.fit(boring(), **resume)
        return fitting, monitor

    half, _ = fit(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(2, ckpt_path=tmp_path / "half.ckpt")
    _, whole = fit(2)
    assert drawn(resumed).shape == (2, 8)
    assert drawn(resumed).tolist() == drawn(whole).tolist()
    assert resumed.state_dict() == whole.state_dict()


def test_without_plot_and_table_checkpoints_hold_no_history(tmp_path):
    monitor = TrustRatioMonitor()
    trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1, callbacks=[monitor]).fit(boring())
    assert monitor.state_dict() == {}


def test_fast_dev_run_draws_nothing(tmp_path):
    monitor = TrustRatioMonitor(picture=tmp_path / "trust.png", table=True)
    trainer(tmp_path, fast_dev_run=2, callbacks=[monitor]).fit(boring())
    assert not list(tmp_path.rglob("*.png"))


def test_a_trainer_that_logs_nothing_can_still_print_the_table(tmp_path, capsys):
    barebones = Trainer(
        barebones=True,
        max_steps=3,
        accelerator="cpu",
        devices=1,
        callbacks=[TrustRatioMonitor(table=True)],
    )
    barebones.fit(Unlogged())
    assert "net.0.weight" in capsys.readouterr().out


def test_layers_of_two_optimizers_do_not_mix_and_have_the_order_of_the_network(tmp_path):
    class Two(Boring):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            first = LARS([self.net[2].weight, self.net[0].weight], lr=1.0)
            return [first, LARS([self.net[1].weight], lr=2.0)]

    monitor = TrustRatioMonitor(picture="trust.png", alerts=False)
    trainer(tmp_path, log_every_n_steps=1, callbacks=[monitor]).fit(Two())
    _, (above, _) = monitor.plot()
    labels = [label.get_text() for label in above.get_yticklabels()]
    assert labels == ["LARS/net.0", "LARS/net.2", "LARS-1/net.1"]


def test_a_warning_names_the_optimizer_where_there_are_several(tmp_path):
    class Two(Unlogged):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for layer, optimizer in zip(self.net, self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(layer(batch).pow(2).mean())
                optimizer.step()

        def configure_optimizers(self):
            self.net = nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 2))
            return [build_optimizer(each, LARS, lr=lr) for each, lr in zip(self.net, (1.0, 0.1), strict=True)]

    fit = trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[TrustRatioMonitor()])
    with pytest.warns(UserWarning, match=r"^LARS-1: trust_coefficient \* lr is 0.0001 at its peak"):
        fit.fit(Two())


@pytest.mark.parametrize("table", [None, 1, "yes"])
def test_a_table_that_is_neither_asked_for_nor_not_is_refused(table):
    with pytest.raises(ValueError, match="table must be True or False"):
        TrustRatioMonitor(table=table)


class SkipsALayer(Plain):
    """Leaves its first layer without a gradient in every third batch."""

    def training_step(self, batch, batch_idx):
        hidden = self.net[:2](batch)
        return self.net[2](hidden.detach() if batch_idx % 3 == 0 else hidden).pow(2).mean()

    def configure_optimizers(self):
        return build_optimizer(self, LARS, lr=1.0)


def test_steps_between_logs_may_skip_layers(tmp_path):
    logged = []

    class Reads(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            logged.append(
                {name: float(ratio) for name, ratio in trainer.optimizers[0].trust_ratios().items()}
            )

    monitor = TrustRatioMonitor(table=True)
    torch.manual_seed(0)
    trainer(tmp_path, callbacks=[monitor, Reads()], log_every_n_steps=4).fit(SkipsALayer())
    of_layers = monitor._history.statistics["trust_ratio"]
    for layer in ("net.0.weight", "net.2.weight"):
        expected = [[each[layer] for each in logged[k : k + 4] if layer in each] for k in (0, 4)]
        mean = sum(sum(each) / len(each) for each in expected) / 2
        assert of_layers[layer].mean == pytest.approx(mean, rel=1e-5)
        assert of_layers[layer].maximum == pytest.approx(max(map(max, expected)), rel=1e-5)
