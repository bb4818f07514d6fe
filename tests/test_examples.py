"""Runs the examples as users would: each script once in a separate process, the rest in this one."""

import csv
import importlib
import math
import os
import re
import runpy
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import lightning
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[1]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

pytestmark = pytest.mark.timeout(300)  # whole runs


def run(tmp_path, script, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """What train.py prints with these arguments, without starting a process for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(os, "environ", os.environ.copy())  # Lightning writes its seed there, and more for DDP

    def printed(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        importlib.import_module("train").main()
        return capsys.readouterr().out

    return printed


def accuracy(printed):
    (percent,) = re.findall(r"Test accuracy: ([\d.]+)%", printed)
    return float(percent)


def columns(tmp_path):
    (log,) = tmp_path.glob("logs/*/version_0/metrics.csv")
    with log.open() as file:
        return set(next(csv.reader(file)))


@pytest.mark.slow
def test_the_main_job_reaches_the_accuracy_that_the_readme_promises(tmp_path):
    result = run(tmp_path, "train.py")
    assert result.returncode == 0, result.stderr
    assert accuracy(result.stdout) > 95
    assert re.search("Epoch 14[/:]", result.stdout), result.stdout


def test_the_main_job_trains_prints_its_groups_and_logs_the_trust_ratios(tmp_path, train):
    printed = train("--epochs", "6")
    assert accuracy(printed) > 90
    for name in ("net.0.weight", "adapted", "BatchNorm2d", "excluded"):
        assert name in printed, printed
    assert re.search("Epoch 5[/:]", printed), printed  # of rich or, with Lightning before 2.6, of tqdm
    layers = {f"trust_ratio_per_layer/net.{index}.weight" for index in (0, 3, 6, 11)}
    assert columns(tmp_path) >= layers | {"trust_ratio/min", "trust_ratio/median", "trust_ratio/max", "loss"}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lamb", "sgd", "adamw"])
def test_the_other_optimizers_train_too(tmp_path, train, optimizer):
    assert accuracy(train("--optimizer", optimizer, "--epochs", "4")) > 90
    assert ("trust_ratio/min" in columns(tmp_path)) == (optimizer == "lamb")


@pytest.mark.slow
@pytest.mark.skipif(
    not FASHION_MNIST.exists(), reason="the Debian package dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_trains(train, monkeypatch):
    read = importlib.import_module("images").fashion_mnist

    def part(folder):
        return [TensorDataset(*each[:4096]) for each in read(folder)]

    monkeypatch.setattr(importlib.import_module("train"), "fashion_mnist", part)
    arguments = ["--dataset", "fashion-mnist", "--epochs", "2", "--batch-size", "256"]
    assert accuracy(train(*arguments)) > 60


def test_missing_images_name_the_command_that_installs_them(tmp_path, train):
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        train("--dataset", "fashion-mnist", "--data-dir", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "1438"], "--batch-size: must be at most 1437 for 1,437 images, got 1438"),
        (["--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
    ],
)
def test_a_job_that_would_train_nothing_is_refused(train, capsys, arguments, message):
    with pytest.raises(SystemExit):
        train("--accelerator", "cpu", *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["HEAD", "NODES", "DEVICES"])
def test_the_script_for_several_hosts_names_the_variable_that_it_lacks(missing):
    given = {"HEAD": "localhost", "NODES": "1", "DEVICES": "1", "PATH": os.environ["PATH"]}
    script = ROOT / "examples" / "multi_node" / "torchrun.sh"
    del given[missing]
    result = subprocess.run(["sh", script], env=given, capture_output=True, text=True)
    assert result.returncode
    assert f"{missing}: must be the n" in result.stderr


def test_arguments_of_the_trainer_reach_it(train, monkeypatch):
    trainers = []
    fit = lightning.Trainer.fit

    def noted(self, *arguments, **options):
        trainers.append(self)
        fit(self, *arguments, **options)

    monkeypatch.setattr(lightning.Trainer, "fit", noted)
    arguments = ["--strategy", "ddp", "--devices", "1", "--accelerator", "cpu", "--epochs", "1"]
    arguments += ["--timeout", "2", "--norm", "group"]
    try:
        assert accuracy(train(*arguments, "--batch-size", "64", "--precision", "64-true")) > 10
    finally:
        dist.destroy_process_group()
    (trainer,) = trainers
    assert type(trainer.strategy).__name__ == "DDPStrategy"
    assert trainer.strategy._timeout == timedelta(minutes=2)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in trainer.lightning_module.modules())
    assert trainer.precision == "64-true"
    assert trainer.num_training_batches == 1437 // 64


@pytest.mark.slow
@pytest.mark.distributed
def test_two_devices_train(tmp_path):
    arguments = ["--strategy", "ddp", "--devices", "2", "--accelerator", "cpu", "--epochs", "2"]
    result = run(tmp_path, "train.py", *arguments, "--batch-size", "64")
    assert result.returncode == 0, result.stderr
    assert accuracy(result.stdout) > 10
    assert "world_size: 2" in result.stderr or "2 processes" in result.stderr, result.stderr


def test_plain_torch_lowers_the_loss(capsys):
    runpy.run_path(str(ROOT / "examples" / "plain_torch.py"), run_name="__main__")
    losses = re.findall(r"loss ([\d.]+)", capsys.readouterr().out)
    assert len(losses) == 6
    assert float(losses[-1]) < 0.1 * float(losses[0])


@pytest.mark.slow
def test_fabric_trains_resumes_and_reports_its_accuracy(tmp_path):
    printed = run(tmp_path, "fabric.py", "--epochs", "4").stdout
    assert printed.count("trust ratios") == 4
    assert float(re.search(r"Test accuracy: ([\d.]+) %", printed)[1]) > 90


@pytest.mark.parametrize("model", ["residual", "vit"])
def test_a_layer_scale_grows_where_gains_are_excluded_and_not_where_they_are_adapted(
    monkeypatch, capsys, model
):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    arguments = ["--model", model, "--optimizer", "LAMB", "--lr", "0.01", "--epochs", "1", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["layer_scale.py", *arguments])
    threads = torch.get_num_threads()
    importlib.import_module("layer_scale").main()
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    (sizes,) = re.findall(r"LAMB .* ([\d.]+e-\d+) .* ([\d.]+e-\d+)", printed)
    adapted, excluded = map(float, sizes)
    assert adapted < 1.5e-6
    assert excluded > 1e-3


@pytest.mark.slow
def test_simclr_learns_features_that_a_few_labels_suffice_for(tmp_path):
    result = run(tmp_path, "simclr.py", "--dataset", "digits", "--epochs", "15", "--labels", "60")
    assert result.returncode == 0, result.stderr
    accuracies = dict(re.findall(r"(pixels|before|after)[^\n]*?([\d.]+) %", result.stdout))
    assert float(accuracies["after"]) > max(float(accuracies["before"]), float(accuracies["pixels"])) + 5
    assert "PreciseBatchNorm" not in result.stderr  # no layer is left out


@pytest.mark.slow
def test_a_growing_batch_is_compared_with_a_decaying_rate(tmp_path):
    arguments = ["--dataset", "digits", "--train-images", "1280", "--epochs", "8", "--seeds", "1"]
    result = run(tmp_path, "growing_batch.py", *arguments)
    assert result.returncode == 0, result.stderr
    row = r"(neither|the rate decays|the batch grows) +│ (\d+) +│ [\d.]+ +│ ([\d.]+)"
    rows = re.findall(row, result.stdout)
    steps = {way: int(count) for way, count, _ in rows}
    # Epochs of 10 batches: 4 epochs of 10 steps, 2 of 512, 512 and 256 samples, 2 that are less than 2,048.
    assert steps == {"neither": 80, "the rate decays": 80, "the batch grows": 40 + 6 + 2}
    assert min(float(accuracy) for _, _, accuracy in rows) > 90


@pytest.mark.slow
def test_the_advice_on_the_network_of_the_study_is_printed_at_toy_size(tmp_path):
    arguments = ["--dataset", "digits", "--epochs", "3", "--max-steps", "4", "--after", "2"]
    result = run(tmp_path, "advice_check.py", *arguments, "--optimizers", "SGD", "LARS")
    assert result.returncode == 0, result.stderr
    printed = result.stdout
    assert "After 2 epochs" in printed
    for optimizer in ("SGD", "LARS"):
        [row] = [line for line in printed.splitlines() if f" {optimizer} " in line]
        assert row.count("try") + row.count("unknown") == 2


def test_a_recipe_of_one_seed_is_reported_without_a_spread(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    report = importlib.import_module("recipe_report").report
    for seeds, spreads in ((1, 0), (2, 1)):
        rows = [
            {
                "optimizer": "LAMB",
                "batch": 64,
                "seed": seed,
                "steps": 8,
                "seconds": 1.0,
                "accuracy": 90.0 + seed,
            }
            for seed in range(seeds)
        ]
        report("Images", rows, tmp_path)
        assert capsys.readouterr().out.count("+- 0.707") == spreads
        assert (tmp_path / "images.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_the_recipe_for_a_gpu_runs_at_toy_size(tmp_path):
    seeds = 2
    result = run(tmp_path, "gpu_recipe.py", "--toy", "--seeds", str(seeds), "--output-dir", "found")
    assert result.returncode == 0, result.stderr
    for name, metric, best, per_seed in (
        ("images_by_a_resnet-20", "accuracy", max, 5),
        ("text_by_a_transformer", "bits", min, 4),
    ):
        assert (tmp_path / "found" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        with (tmp_path / "found" / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        (column,) = (each for each in rows[0] if each.startswith(metric))
        results = [float(row[column]) for row in rows]
        assert [row["seed"] for row in rows] == [str(seed) for seed in range(seeds) for _ in range(per_seed)]
        assert len(set(results)) > (seeds - 1) * per_seed  # a seed is not the other one again
        # Better than a guess, and the many steps of the small batch better than the few of the large one.
        smallest = min(rows, key=lambda row: int(row["batch"]))["batch"]
        of_the_small = [float(row[column]) for row in rows if row["batch"] == smallest]
        assert best(results) == best(of_the_small)
        assert results[0] > 20 if best is max else results[0] < 8
        assert {row["optimizer"] for row in rows} >= {"LAMB", "AdamW"}


def test_resnet20_has_the_layers_of_the_paper(monkeypatch):
    """He et al. 2015, table 6: 0.27 million parameters with three channels, two fewer of which are here."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    net = importlib.import_module("resnet20").resnet20()
    layers = [p for p in net.parameters() if p.ndim > 1]
    assert len(layers) == 20
    assert sum(p.numel() for p in net.parameters()) == 269_722 - 2 * 16 * 9


def test_images_are_moved_by_two_pixels_at_most_and_mirrored(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    shifted = importlib.import_module("resnet20").shifted
    image = torch.rand(1, 1, 6, 5)
    padded = torch.nn.functional.pad(image, [2] * 4, mode="replicate")
    possible = [padded[..., y : y + 6, x : x + 5] for y in range(5) for x in range(5)]
    possible += [each.flip(3) for each in possible]
    torch.manual_seed(0)
    seen = {
        next(i for i, each in enumerate(possible) if torch.equal(each[0], moved))
        for moved in shifted(image.expand(500, -1, -1, -1))
    }
    assert len(seen) == 50


def test_the_contrastive_loss_matches_the_paper(monkeypatch):
    """Chen et al. 2020, equation 1, pair by pair."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    loss = importlib.import_module("simclr").contrastive_loss
    projected, temperature = torch.randn(8, 5, dtype=torch.float64), 0.3
    similar = [[float(functional.cosine_similarity(a, b, dim=0)) for b in projected] for a in projected]
    pairs = []
    for i in range(8):
        others = sum(math.exp(similar[i][k] / temperature) for k in range(8) if k != i)
        pairs.append(-math.log(math.exp(similar[i][(i + 4) % 8] / temperature) / others))
    assert float(loss(projected, temperature)) == pytest.approx(sum(pairs) / 8, rel=1e-12)
