"""What the monitor logs, when, and at which cost."""

import csv
from functools import partial
from statistics import median

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lars import LAMB, LARS, TrustRatioMonitor, build_optimizer
from tests.boring import Boring, boring, trainer

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


def logged(logger):
    """Rows of a CSVLogger that hold trust ratios, by step."""
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = {}
        for row in csv.DictReader(file):
            values = {k: float(v) for k, v in row.items() if k.startswith("trust_ratio") and v}
            if values:
                assert int(row["step"]) not in rows
                rows[int(row["step"])] = values
        return rows


@pytest.mark.parametrize("optimizer", [partial(LARS, lr=1.0, weight_decay=0.1), LAMB])
def test_logs_the_ratio_that_each_layer_used(tmp_path, optimizer):
    logger, spy = CSVLogger(tmp_path), Spy()
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[TrustRatioMonitor(), spy]).fit(
        boring(optimizer, exclude_bias=False)
    )
    rows = logged(logger)
    assert sorted(rows) == list(range(8))
    for step, row in rows.items():
        ratios = spy.ratios[step]
        assert {f"trust_ratio/{name}": ratio for name, ratio in ratios.items()}.items() <= row.items()
        assert sorted(ratios) == LAYERS
        assert row["trust_ratio/min"] == min(ratios.values())
        assert row["trust_ratio/max"] == max(ratios.values())
        assert row["trust_ratio/median"] == pytest.approx(median(ratios.values()), rel=1e-6)


def test_logs_on_the_steps_on_which_lightning_logs(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, logger=logger, log_every_n_steps=3, callbacks=[TrustRatioMonitor()]).fit(boring())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        losses = {int(row["step"]) for row in csv.DictReader(file) if row["loss"]}
    assert sorted(logged(logger)) == sorted(losses) == [2, 5]


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3]), (2, [1, 3])])
def test_logs_once_for_an_accumulated_step_with_what_it_used(tmp_path, every, steps):
    logger, spy = CSVLogger(tmp_path), Spy()
    trainer(
        tmp_path,
        logger=logger,
        log_every_n_steps=every,
        accumulate_grad_batches=2,
        callbacks=[TrustRatioMonitor(), spy],
    ).fit(boring())
    rows = logged(logger)
    assert sorted(rows) == steps
    assert [rows[step]["trust_ratio/net.0.weight"] for step in steps] == [
        spy.ratios[step]["net.0.weight"] for step in steps
    ]


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


def test_the_host_reads_once_in_a_logging_step_and_never_in_between(tmp_path):
    """Against the same run without the monitor: Lightning reads the loss whenever it logs."""

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

    on_host = {"min", "median", "max"}  # read from a tensor that is on the host already
    for every, logging_steps in ((100, 0), (4, 2), (1, 8)):
        without, with_monitor = reads(every, []), reads(every, [TrustRatioMonitor()])
        assert with_monitor - without == logging_steps * len(on_host)
    assert reads(1, []) > 0


def test_two_optimizers_are_told_apart(tmp_path):
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
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[TrustRatioMonitor()]).fit(
        TwoOptimizers()
    )
    rows = logged(logger)
    assert "trust_ratio/LARS/weight" in rows[1]
    assert "trust_ratio/LARS-1/weight" in rows[1]
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
    trainer(tmp_path, logger=logger, log_every_n_steps=2, callbacks=[spy, TrustRatioMonitor()]).fit(Rare())
    rows = logged(logger)
    assert sorted(rows) == [1, 3, 7]
    assert [row["trust_ratio/weight"] for row in rows.values()] == [
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


def test_without_trust_ratios_says_what_to_do(tmp_path):
    fit = trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[TrustRatioMonitor()])
    with pytest.raises(MisconfigurationException, match=r"trust ratios, got \['SGD'\]: use LARS or LAMB"):
        fit.fit(boring(partial(torch.optim.SGD, lr=0.1)))


def test_fast_dev_run_works(tmp_path):
    fit = trainer(tmp_path, fast_dev_run=2, logger=CSVLogger(tmp_path), callbacks=[TrustRatioMonitor()])
    fit.fit(boring())
    assert fit.global_step == 2
