"""What callbacks log, and the hyperparameters of the mixin, arrive in every logger, alone and together."""

import csv
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning import LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_lars import (
    LAMB,
    LARS,
    BatchSizeScaling,
    BatchSizeSchedule,
    GradientNoiseScale,
    LargeBatchMixin,
    LearningRateWarmup,
    ParamGroupSummary,
    PercentileGradientClipping,
    TrustRatioMonitor,
    WarmupDecayLR,
)
from lightning_lars.cli import LargeBatchCLI
from tests.support.boring import trainer
from tests.support.page import lines_for

pytestmark = [
    # Of the libraries themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:LARS moves excluded parameters", "ignore:MLFlow only allows"),
]


class Net(LargeBatchMixin, LightningModule):
    """Layers with names that some logger does not take as they are."""

    def __init__(self, width: int = 4, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))
        self.convs = nn.ModuleDict({"<user___buys___item>": nn.Linear(width, 2), "x[0]": nn.Linear(width, 2)})

    def training_step(self, batch, batch_idx):
        hidden = self.net(batch)
        loss = sum(layer(hidden).pow(2).mean() for layer in self.convs.values())
        self.log("loss", loss)
        return loss

    def train_dataloader(self):
        samples = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(samples, batch_size=4)


def fit(tmp_path, *loggers):
    torch.manual_seed(0)
    callbacks = [
        TrustRatioMonitor("*", gradient_norm=True),
        LearningRateWarmup(warmup_steps=2),
        BatchSizeScaling(base_batch_size=8),
        BatchSizeSchedule({0: 8, 1: 16}),
        GradientNoiseScale(every_n_steps=1),
        PercentileGradientClipping(),
        LearningRateMonitor(),
        ParamGroupSummary(),
    ]
    run = trainer(tmp_path, logger=list(loggers), callbacks=callbacks, log_every_n_steps=1, max_epochs=2)
    run.fit(Net(**SETTINGS))


SETTINGS = {"optimizer": partial(LARS, lr=3.2), "lr_scheduler": partial(WarmupDecayLR, warmup_steps=1)}
DESCRIBED = {
    "optimizer": {"class_path": "lightning_lars.optim.lars.LARS", "init_args": {"lr": 3.2}},
    "lr_scheduler": {
        "class_path": "lightning_lars.learning_rate.warmup_decay.WarmupDecayLR",
        "init_args": {"warmup_steps": 1},
    },
}


def csv_logger(tmp_path):
    return CSVLogger(tmp_path / "csv")


def tensorboard(tmp_path):
    return TensorBoardLogger(tmp_path / "tensorboard")


def wandb_logger(tmp_path):
    pytest.importorskip("wandb")
    return WandbLogger(save_dir=tmp_path, offline=True)


def mlflow(tmp_path):
    pytest.importorskip("mlflow")
    return MLFlowLogger(
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / "artifacts")
    )


LOGGERS = {"csv": csv_logger, "tensorboard": tensorboard, "wandb": wandb_logger, "mlflow": mlflow}


def in_csv(logger):
    logger.save()
    with open(Path(logger.log_dir, "metrics.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    values: dict = {}
    for row in rows:
        for key, value in row.items():
            if value != "" and key not in ("step", "epoch"):
                values.setdefault(key, {})[int(row["step"])] = float(value)
    return values


def in_tensorboard(logger):
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in ("epoch", "hp_metric")]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def in_mlflow(logger):
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    return {
        key: {each.step: each.value for each in logger.experiment.get_metric_history(logger.run_id, key)}
        for key in metrics
        if key != "epoch"
    }


def in_wandb(logger):
    """The last value of each metric, at the last step: an offline run shows no more."""
    summary = dict(logger.experiment.summary)
    last = summary["trainer/global_step"]
    scalars = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    return {
        key: {last: value}
        for key, value in scalars.items()
        if key not in ("epoch", "trainer/global_step") and not key.startswith("_")
    }


READ = {"csv": in_csv, "tensorboard": in_tensorboard, "wandb": in_wandb, "mlflow": in_mlflow}


def as_key(name, key):
    # Lightning removes these for MLflow, and says so.
    return re.sub(r"[^a-zA-Z0-9_/. -]", "", key) if name == "mlflow" else key


def flat(nested, prefix=""):
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def hyperparameters(name, logger):
    if name == "wandb":
        return dict(logger.experiment.config)
    if name == "mlflow":
        return dict(logger.experiment.get_run(logger.run_id).data.params)
    return yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())


@pytest.fixture(autouse=True)
def quietly(monkeypatch):
    for name, value in {"WANDB_SILENT": "true", "WANDB_MODE": "offline", "DO_NOT_TRACK": "1"}.items():
        monkeypatch.setenv(name, value)
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


@pytest.mark.parametrize(
    "names",
    [
        ["csv", "tensorboard"],
        pytest.param(["wandb"], marks=pytest.mark.slow),
        pytest.param(["mlflow"], marks=pytest.mark.slow),
        pytest.param(["mlflow", "wandb", "csv", "tensorboard"], marks=pytest.mark.slow),
    ],
    ids="+".join,
)
def test_every_logger_stores_what_the_csv_file_has(tmp_path, names):
    reference = csv_logger(tmp_path / "reference")
    fit(tmp_path, reference)
    expected = in_csv(reference)
    assert {key.partition("/")[0] for key in expected} >= {
        "trust_ratio",
        "effective_lr",
        "trust_ratio_per_layer",
        "gradient_noise_scale",
        "gradient_clipping",
        "batch_size",
        "lr-LARS",
    }
    loggers = {name: LOGGERS[name](tmp_path) for name in names}
    fit(tmp_path, *loggers.values())
    for name, logger in loggers.items():
        stored = READ[name](logger)
        last = max(stored["loss"])
        assert stored.keys() == {as_key(name, key) for key in expected}, name
        for key, values in expected.items():
            found = stored[as_key(name, key)]
            compared = {last: values[max(values)]} if name == "wandb" else values
            assert found == pytest.approx(compared, rel=1e-6, nan_ok=True), (name, key)


@pytest.mark.parametrize(
    "name", ["csv", "tensorboard", *(pytest.param(n, marks=pytest.mark.slow) for n in ("wandb", "mlflow"))]
)
def test_every_logger_stores_the_arguments_of_optimizer_and_schedule(tmp_path, name):
    logger = LOGGERS[name](tmp_path)
    trainer(tmp_path, logger=logger, max_steps=2, log_every_n_steps=1).fit(Net(width=5, **SETTINGS))
    stored = dict(flat(hyperparameters(name, logger)))
    expected = {"width": 5, **dict(flat(DESCRIBED))}
    assert {key: str(stored[key]) for key in expected} == {key: str(value) for key, value in expected.items()}


@pytest.mark.parametrize(
    "name", ["csv", "tensorboard", *(pytest.param(n, marks=pytest.mark.slow) for n in ("wandb", "mlflow"))]
)
def test_arguments_that_are_no_plain_numbers_are_stored_as_such(tmp_path, name):
    arguments = {
        "lr": torch.tensor(0.5, dtype=torch.float64),
        "betas": (0.5, 0.25),
        "bias_correction": True,
        "max_grad_norm": None,
    }
    logger = LOGGERS[name](tmp_path)
    module = Net(optimizer=partial(LAMB, **arguments))
    trainer(tmp_path, logger=logger, max_steps=2, log_every_n_steps=1).fit(module)
    stored = dict(flat(hyperparameters(name, logger)))
    expected = {"lr": 0.5, "betas": [0.5, 0.25], "bias_correction": True, "max_grad_norm": None}
    found = {key: str(stored[f"optimizer/init_args/{key}"]) for key in expected}
    assert found == {key: str(value) for key, value in expected.items()}
    assert module.hparams["optimizer"].keywords == arguments


def test_any_argument_is_described_by_what_yaml_can_hold():
    def build(groups, *args, **kwargs):
        pass

    argument = {1: torch.ones(2), "of": (torch.float32, [torch.tensor(0.5)])}
    described = Net(optimizer=partial(build, [], argument, like=argument)).hparams_initial["optimizer"]
    plain = {"1": [1.0, 1.0], "of": ["torch.float32", [0.5]]}
    assert described["args"] == [[], plain]
    assert described["init_args"] == {"like": plain}
    assert yaml.safe_load(yaml.safe_dump(described)) == described


@pytest.mark.parametrize(
    "name", ["tensorboard", *(pytest.param(n, marks=pytest.mark.slow) for n in ("wandb", "mlflow"))]
)
def test_the_lines_of_the_page_store_the_plot_with_the_run(tmp_path, name):
    logger, monitor = LOGGERS[name](tmp_path), TrustRatioMonitor()
    run = trainer(tmp_path, logger=logger, callbacks=[monitor], max_steps=2, log_every_n_steps=1)
    run.fit(Net())
    exec(lines_for("figures"), {"monitor": monitor, "trainer": run})
    if name == "wandb":
        assert logger.experiment.summary["trust_ratios"]["count"] == 1
    elif name == "mlflow":
        (stored,) = logger.experiment.list_artifacts(logger.run_id)
        assert stored.path == "trust_ratios.png"
        assert stored.file_size > 10_000
    else:
        logger.experiment.flush()
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        assert events.Tags()["images"] == ["trust_ratios"]


def test_hyperparameters_of_loggers_are_described_and_those_of_checkpoints_are_not():
    def build(groups, lr):
        return LARS(groups, lr=lr)

    shown = {"class_path": "torch.optim.sgd.SGD"}
    for optimizer, described in (
        (SETTINGS["optimizer"], DESCRIBED["optimizer"]),
        (torch.optim.SGD, shown),
        (partial(partial(LARS, lr=3.2), momentum=0.8), None),
        (partial(build, lr=2.0), None),
    ):
        module = Net(optimizer=optimizer)
        assert module.hparams["optimizer"] is optimizer
        if described is not None:
            assert module.hparams_initial["optimizer"] == described
    assert module.hparams_initial["optimizer"]["class_path"].endswith("<locals>.build")
    assert module.hparams_initial["optimizer"]["init_args"] == {"lr": 2.0}
    assert module.hparams["optimizer"].keywords == {"lr": 2.0}
    assert "optimizer" not in Net().hparams_initial
    assert module.hparams_initial["width"] == 4


class Plain(LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(4, width)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).pow(2).mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(8, 4), batch_size=4)


@pytest.mark.parametrize(
    "name", ["csv", *(pytest.param(n, marks=pytest.mark.slow) for n in ("wandb", "mlflow"))]
)
def test_the_lines_of_the_page_log_the_configuration_of_the_cli(tmp_path, name, monkeypatch):
    kind = {"csv": "CSVLogger", "wandb": "WandbLogger", "mlflow": "MLFlowLogger"}[name]
    if name in ("wandb", "mlflow"):
        pytest.importorskip(name)
    where = {
        "csv": [f"--trainer.logger.save_dir={tmp_path}"],
        "wandb": [f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.offline=true"],
        "mlflow": [f"--trainer.logger.tracking_uri=sqlite:///{tmp_path}/mlflow.db"],
    }[name]
    quiet = ["enable_progress_bar", "enable_model_summary", "enable_checkpointing"]
    arguments = [
        "fit",
        "--seed_everything=0",
        *(f"--trainer.{each}=false" for each in quiet),
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=1",
        f"--trainer.logger={kind}",
        *where,
        "--optimizer=lightning_lars.LARS",  # other tests import other classes of that name
        "--optimizer.lr=3.2",
    ]
    monkeypatch.chdir(tmp_path)
    names = {"LargeBatchCLI": partial(LargeBatchCLI, args=arguments), "Net": Plain}
    exec(lines_for("loggers"), names)
    logger = names["cli"].trainer.logger
    stored = dict(flat(hyperparameters(name, logger)))
    assert str(stored["config/optimizer/init_args/lr"]) == "3.2"
    assert stored["config/optimizer/class_path"] == "lightning_lars.LARS"
    assert str(stored["width"]) == "4"
