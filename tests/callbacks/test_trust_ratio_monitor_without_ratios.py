"""What the monitor logs, plots and says of optimizers without trust ratios."""

import csv
import math
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_lars import (
    LARS,
    BatchSizeScaling,
    ExcludeNormAndBias,
    LearningRateWarmup,
    TrustRatioMonitor,
)
from tests.support.boring import Boring, Plain, boring, trainer
from tests.support.heatmap import cells
from tests.support.ranks import on_ranks
from tests.support.setups import alone, fsdp2, full_shard
from tests.workers.edges import updates_of_plain_optimizer

MATRICES = ["net.0.weight", "net.2.weight"]
SGD, ADAMW = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.AdamW, lr=0.1)


class Bare(Plain):
    """With an optimizer over all parameters, as most modules have."""

    def __init__(self, optimizer):
        torch.manual_seed(0)
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Witness(Callback):
    """Computes what the monitor logs from the weights before and after each step, in float64."""

    def __init__(self):
        self.seen = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.before = {name: p.detach().double().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        after = {name: p.detach().double() for name, p in pl_module.named_parameters()}
        change = {name: (after[name] - self.before[name]).norm().item() for name in after}
        gradient = {name: p.grad.double().norm().item() for name, p in pl_module.named_parameters()}
        self.seen.append(
            {
                "update_to_weight": {name: change[name] / after[name].norm().item() for name in after},
                "gradient_norm": gradient,
                "effective_lr": {
                    name: change[name] / gradient[name] if gradient[name] else 0.0 for name in after
                },
            }
        )


def rows(logger, key):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
            if row.get(key)
        ]


@pytest.mark.parametrize("optimizer", [SGD, ADAMW, partial(torch.optim.Adagrad, lr=0.1)])
def test_logs_how_far_each_layer_moved_and_with_which_gradient(tmp_path, optimizer):
    logger, witness = CSVLogger(tmp_path), Witness()
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[TrustRatioMonitor("*"), witness]).fit(
        Bare(optimizer)
    )
    logged = rows(logger, "update_to_weight/min")
    assert len(logged) == len(witness.seen) == 8
    for row, expected in zip(logged, witness.seen, strict=True):
        for quantity, layers in expected.items():
            for name, value in layers.items():
                actual = row[f"{quantity}_per_layer/{name}"]
                # The gradient of a bias before a batch norm is rounding.
                assert actual == pytest.approx(value, rel=1e-3, abs=1e-6) or name == "net.0.bias", quantity
            assert row[f"{quantity}/max"] >= max(row[f"{quantity}_per_layer/{name}"] for name in MATRICES)
        assert not any(key.startswith("trust_ratio") for key in row)


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.01}, {"accumulate_grad_batches": 2}])
def test_the_effective_rate_of_sgd_is_its_learning_rate(tmp_path, options):
    logger = CSVLogger(tmp_path)
    callbacks = [LearningRateWarmup(warmup_steps=4), BatchSizeScaling(8), TrustRatioMonitor(MATRICES)]
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=callbacks, **options).fit(boring(SGD))
    logged = rows(logger, "effective_lr/max")
    assert len(logged) == (4 if "accumulate_grad_batches" in options else 8)
    scale = options.get("accumulate_grad_batches", 1) * 4 / 8
    for step, row in enumerate(logged):
        rate = 0.1 * scale * min(1.0, (step + 1) / 4)
        for name in MATRICES:
            assert row[f"effective_lr_per_layer/{name}"] == pytest.approx(rate, rel=1e-3)
        if "gradient_clip_val" in options:
            assert row["gradient_norm/max"] <= 0.01 * (1 + 1e-5)  # after clipping


@pytest.mark.filterwarnings("ignore:BatchSizeScaling multiplies the learning rate by")
def test_the_callbacks_of_the_readme_go_around_a_module_with_adam(tmp_path):
    logger = CSVLogger(tmp_path)
    callbacks = [
        ExcludeNormAndBias(),
        LearningRateWarmup(warmup_epochs=0.5),
        BatchSizeScaling(),
        TrustRatioMonitor("*"),
    ]
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=callbacks).fit(
        Bare(partial(torch.optim.Adam, lr=0.01))
    )
    row = rows(logger, "update_to_weight/min")[-1]
    layers = {key.partition("/")[2] for key in row if key.startswith("update_to_weight_per_layer/")}
    assert layers == set(MATRICES)


def test_lars_logs_gradient_norms_on_request(tmp_path):
    by_default, on_request = CSVLogger(tmp_path, name="without"), CSVLogger(tmp_path, name="with")
    witness = Witness()
    for logger, monitor in (
        (by_default, TrustRatioMonitor("*")),
        (on_request, TrustRatioMonitor("*", gradient_norm=True)),
    ):
        callbacks = [monitor, witness]
        trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=callbacks).fit(boring())
    [plain, measured] = (rows(logger, "trust_ratio/min") for logger in (by_default, on_request))
    assert not any(key.startswith("gradient_norm") for row in plain for key in row)
    for row, expected, without in zip(measured, witness.seen[8:], plain, strict=True):
        for name in MATRICES:
            norm = expected["gradient_norm"][name]
            assert row[f"gradient_norm_per_layer/{name}"] == pytest.approx(norm, rel=1e-4)
        assert {key: value for key, value in row.items() if not key.startswith("gradient_norm")} == without


class Partly(Boring):
    """With a frozen layer, and one that is not used."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.unused = nn.Linear(2, 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_an_unused_layer_is_logged_as_unmoved_and_a_frozen_one_not_at_all(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[TrustRatioMonitor("*")]).fit(
        Partly(optimizer=LARS)
    )
    for row in rows(logger, "update_to_weight/min"):
        assert not any("frozen" in key for key in row)
        for quantity in ("update_to_weight", "gradient_norm", "effective_lr"):
            assert row[f"{quantity}_per_layer/unused.weight"] == 0


class Two(Boring):
    """LARS for one layer, SGD for another."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self):
        first, _, last = self.net
        return [LARS(first.parameters(), lr=1.0), torch.optim.SGD(last.parameters(), lr=0.1)]

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        loss = self.net(batch).pow(2).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


def test_an_optimizer_with_ratios_and_one_without_log_side_by_side(tmp_path):
    logger, monitor = CSVLogger(tmp_path), TrustRatioMonitor("*", alerts=False)
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[monitor]).fit(Two(optimizer=LARS))
    for row in rows(logger, "trust_ratio/LARS/min"):
        assert row["effective_lr_per_layer/SGD/net.2.weight"] == pytest.approx(0.1, rel=1e-3)
        assert "gradient_norm/SGD/max" in row
        assert "gradient_norm/LARS/max" not in row
        assert "trust_ratio/SGD/max" not in row


def test_plot_and_table_are_those_of_updates(tmp_path, capsys):
    monitor = TrustRatioMonitor(picture="updates.png", table=True)
    trainer(tmp_path, log_every_n_steps=1, callbacks=[monitor]).fit(Bare(ADAMW))
    assert (tmp_path / "updates.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.startswith("Updates")
    assert "net.2.weight" in printed
    _, (heatmap, lines) = monitor.plot()
    assert heatmap.get_title(loc="left") == "Update-to-weight ratio"
    assert cells(heatmap.collections[0]).shape == (6, 8)
    assert "|change of w| / |g|" in lines.get_title(loc="left")


def test_updates_that_are_not_finite_are_reported(tmp_path):
    class Broken(Boring):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.inf if batch_idx == 2 else 1.0)

    torch.manual_seed(0)
    monitor = TrustRatioMonitor()
    fit = trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1, callbacks=[monitor])
    with pytest.warns(UserWarning, match="updates that are not finite, because weights or gradients"):
        fit.fit(Broken(optimizer=SGD))


def test_nothing_to_measure_says_what_to_do(tmp_path):
    monitor = TrustRatioMonitor(update_to_weight=False, gradient_norm=False)
    fit = trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[monitor])
    with pytest.raises(MisconfigurationException, match=r"measure of \['SGD'\], without trust ratios: leave"):
        fit.fit(boring(SGD))


@pytest.mark.parametrize("value", ["yes", 1, 0.0])
def test_gradient_norm_must_be_none_or_a_flag(value):
    with pytest.raises(ValueError, match="gradient_norm must be None, True or False"):
        TrustRatioMonitor(gradient_norm=value)


@pytest.mark.distributed
@pytest.mark.parametrize("setup", [full_shard, fsdp2])
def test_sharded_layers_are_measured_whole(setup):
    expected = updates_of_plain_optimizer(alone)
    assert expected["gradient_norm"]["unused.widen.weight"] == 0
    for seen in on_ranks(2, updates_of_plain_optimizer, setup):
        for quantity, layers in expected.items():
            assert seen[quantity] == pytest.approx(layers, rel=1e-4, abs=1e-9), quantity
