"""Models of other libraries train with the lines of docs/with_your_library.md, where they are installed."""

import importlib
import math
import warnings

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import nn

from lightning_lars import (
    LAMB,
    LARS,
    BatchSizeScaling,
    ExcludeNormAndBias,
    LargeBatchMixin,
    LearningRateWarmup,
    TrustRatioMonitor,
    build_optimizer,
    recipes,
)
from lightning_lars.groups.introspection import classify
from tests.support.page import groups, lines_for

pytestmark = [
    pytest.mark.slow,
    # Of the libraries.
    pytest.mark.filterwarnings("default"),
]

NAMES = {
    each.__name__.rpartition(".")[2]: each
    for each in (
        LAMB,
        LARS,
        BatchSizeScaling,
        ExcludeNormAndBias,
        LargeBatchMixin,
        LearningRateWarmup,
        TrustRatioMonitor,
        build_optimizer,
        recipes,
    )
}


def run(library, **names):
    """Execute the lines for a library and return the names that they define."""
    names = {**NAMES, **names}
    exec(lines_for(library), names)
    return names


def fit(tmp_path, module, loader, root=lightning.pytorch, **options):
    """Train, and return what the log file of the trust ratios has in its last row."""
    logger = root.loggers.CSVLogger(tmp_path)
    trainer = root.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        log_every_n_steps=1,
        logger=logger,
        callbacks=[TrustRatioMonitor()],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, loader)
    assert all(math.isfinite(trainer.callback_metrics[f"trust_ratio/{key}"]) for key in ("min", "max"))
    return trainer


def check(module, optimizer, decay):
    """Every parameter is in the group of its role, and the adapted ones have trust ratios."""
    expected = {
        layer.name: (layer.group == "adapted", decay if layer.group == "adapted" else 0.0)
        for layer in classify(module)
        if layer.parameter.requires_grad
    }
    found = groups(optimizer)
    assert found == expected
    ratios = optimizer.trust_ratios()
    assert ratios
    assert set(ratios) <= {name for name, (is_adapted, _) in found.items() if is_adapted}
    assert {is_adapted for is_adapted, _ in found.values()} == {True, False}
    for name in found:
        if name.endswith("bias") or "norm" in name.lower().split("."):
            assert not found[name][0], name


def test_a_model_of_pytorch_forecasting(tmp_path):
    library = pytest.importorskip("pytorch_forecasting")
    pandas = pytest.importorskip("pandas")
    rows = [
        {"series": str(series), "time": time, "value": math.sin(time / 5 + series)}
        for series in range(4)
        for time in range(40)
    ]
    dataset = library.TimeSeriesDataSet(
        pandas.DataFrame(rows),
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=8,
        max_prediction_length=2,
        time_varying_unknown_reals=["value"],
    )
    model = run("pytorch_forecasting", dataset=dataset)["model"]
    loader = dataset.to_dataloader(train=True, batch_size=16, num_workers=0)
    trainer = fit(tmp_path, model, loader)
    check(model, trainer.optimizers[0], decay=recipes.lamb(1024)["optimizer"].keywords["weight_decay"])
    assert isinstance(trainer.optimizers[0], LAMB)
    again = type(model).load_from_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=False)
    assert again.hparams["optimizer"].keywords == recipes.lamb(1024)["optimizer"].keywords


def test_a_model_of_neuralforecast(tmp_path):
    pytest.importorskip("neuralforecast")
    pandas = pytest.importorskip("pandas")
    rows = [
        {"unique_id": str(series), "ds": time, "y": math.sin(time / 5 + series)}
        for series in range(4)
        for time in range(40)
    ]
    options = {
        "mlp_units": [[8, 8]] * 3,
        "accelerator": "cpu",
        "devices": 1,
        "enable_progress_bar": False,
        "default_root_dir": tmp_path,
        "log_every_n_steps": 1,
    }
    seen = {}

    class Witness(TrustRatioMonitor):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            seen["rates"] = [group["lr"] for group in trainer.optimizers[0].param_groups]

        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            check(pl_module, trainer.optimizers[0], decay=0.01)
            seen.update(trainer.callback_metrics)

    # With the batch size of the loader, 32 series, the rate would nearly vanish, and a warning say so.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run("neuralforecast", frame=pandas.DataFrame(rows), options=options, TrustRatioMonitor=Witness)
    assert not [each for each in caught if "BatchSizeScaling" in str(each.message)]
    assert seen["rates"] == [2e-3, 1e-3]
    assert seen["effective_lr/max"] > 0


def test_a_model_of_chemprop(tmp_path):
    pytest.importorskip("chemprop")
    data = importlib.import_module("chemprop.data")
    numpy = importlib.import_module("numpy")
    points = [data.MoleculeDatapoint.from_smi("C" * n + "O", numpy.array([float(n)])) for n in range(1, 17)]
    dataset = data.MoleculeDataset(points)
    dataset.normalize_targets()
    loader = data.build_dataloader(dataset, batch_size=4, num_workers=0)
    model = run("chemprop")["model"]
    trainer = fit(tmp_path, model, loader)
    check(model, trainer.optimizers[0], decay=recipes.lamb(1024)["optimizer"].keywords["weight_decay"])
    again = type(model).load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_model_of_pytorch_geometric(tmp_path):
    pytest.importorskip("torch_geometric")
    names = run("torch_geometric")
    model, optimizer = names["model"], names["optimizer"]
    nodes, edges = torch.randn(12, 4), torch.randint(12, (2, 40))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(nodes, edges), torch.arange(12) % 2).backward()
        optimizer.step()
    check(model, optimizer, decay=0.01)
    assert all((p != before[name]).any() for name, p in model.named_parameters())
    assert not groups(optimizer)["convs.0.att_src"][0]
    switched = build_optimizer(model, LAMB, exclude_gain=False)
    assert groups(switched)["convs.0.att_src"][0]


def test_adapters_of_peft(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    names = run("peft", model=transformers.BertModel(config))
    model, optimizer = names["model"], names["optimizer"]
    assert {name.rpartition(".lora_")[2] for name in groups(optimizer)} == {
        "A.default.weight",
        "B.default.weight",
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        model(torch.arange(16).reshape(2, 8)).last_hidden_state[..., 0].mean().backward()
        optimizer.step()
        ratios = optimizer.trust_ratios()
        assert all(0 < ratio <= 1 for ratio in ratios.values()), (step, ratios)
    for name, p in model.named_parameters():
        # No layer shrinks: the step of A is not made of its decay.
        if "lora_A" in name:
            assert p.norm() > 0.99 * before[name].norm()
        assert "lora_" in name or torch.equal(p, before[name])


def test_a_benchmark_of_lightly(tmp_path):
    # The rest of lightly needs torchvision.
    pytest.importorskip("lightly.utils.benchmarking")
    backbone = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
    samples = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(3, (64,)))
    model = run("lightly", backbone=backbone)["model"]
    loader = torch.utils.data.DataLoader(samples, batch_size=16)
    trainer = fit(tmp_path, model, loader, root=pytorch_lightning)
    assert isinstance(trainer.optimizers[0], LARS)
    check(model, trainer.optimizers[0], decay=recipes.lars(16)["optimizer"].keywords["weight_decay"])
