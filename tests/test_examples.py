"""The examples are run as a user would run them."""

import csv
import importlib
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

ROOT = Path(__file__).parents[1]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def run(tmp_path, script, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


def accuracy(result):
    assert result.returncode == 0, result.stderr
    (percent,) = re.findall(r"Test accuracy: ([\d.]+)%", result.stdout)
    return float(percent)


def columns(tmp_path):
    (log,) = tmp_path.glob("logs/*/version_0/metrics.csv")
    with log.open() as file:
        return set(next(csv.reader(file)))


def test_the_main_job_trains_prints_its_groups_and_logs_the_trust_ratios(tmp_path):
    result = run(tmp_path, "train.py")
    assert accuracy(result) > 95
    for name in ("net.0.weight", "adapted", "BatchNorm2d", "excluded", "Epoch 14/14"):
        assert name in result.stdout, result.stdout
    layers = {f"trust_ratio_per_layer/net.{index}.weight" for index in (0, 3, 6, 11)}
    assert columns(tmp_path) >= layers | {"trust_ratio/min", "trust_ratio/median", "trust_ratio/max", "loss"}


@pytest.mark.parametrize("optimizer", ["lamb", "sgd", "adamw"])
def test_the_other_optimizers_train_too(tmp_path, optimizer):
    assert accuracy(run(tmp_path, "train.py", "--optimizer", optimizer)) > 95
    assert ("trust_ratio/min" in columns(tmp_path)) == (optimizer == "lamb")


@pytest.mark.skipif(
    not FASHION_MNIST.exists(), reason="the Debian package dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_trains(tmp_path):
    assert accuracy(run(tmp_path, "train.py", "--dataset", "fashion-mnist", "--epochs", "1")) > 70


def test_missing_images_name_the_command_that_installs_them(tmp_path):
    result = run(tmp_path, "train.py", "--dataset", "fashion-mnist", "--data-dir", str(tmp_path))
    assert result.returncode == 1
    assert "apt-get install dataset-fashion-mnist" in result.stderr


def test_arguments_of_the_trainer_reach_it(tmp_path):
    arguments = ["--strategy", "ddp", "--devices", "2", "--accelerator", "cpu", "--epochs", "2"]
    result = run(tmp_path, "train.py", *arguments, "--batch-size", "64", "--precision", "bf16-mixed")
    assert accuracy(result) > 10
    assert "world_size: 2" in result.stderr or "2 processes" in result.stderr, result.stderr
    assert "bfloat16 Automatic Mixed Precision" in result.stderr


def test_plain_torch_lowers_the_loss(tmp_path):
    losses = re.findall(r"loss ([\d.]+)", run(tmp_path, "plain_torch.py").stdout)
    assert len(losses) == 6
    assert float(losses[-1]) < 0.1 * float(losses[0])


def test_simclr_learns_features_that_a_few_labels_suffice_for(tmp_path):
    result = run(tmp_path, "simclr.py", "--dataset", "digits", "--epochs", "15", "--labels", "60")
    assert result.returncode == 0, result.stderr
    accuracies = dict(re.findall(r"(pixels|before|after)[^\n]*?([\d.]+) %", result.stdout))
    assert float(accuracies["after"]) > max(float(accuracies["before"]), float(accuracies["pixels"])) + 5
    assert "PreciseBatchNorm" not in result.stderr  # no layer is left out


def test_the_recipe_for_a_gpu_runs_at_toy_size(tmp_path):
    result = run(tmp_path, "gpu_recipe.py", "--toy", "--seeds", "2", "--output-dir", "found")
    assert result.returncode == 0, result.stderr
    for name, metric, best, trainings in (
        ("images_by_a_resnet-20", "accuracy", max, 5),
        ("text_by_a_transformer", "bits", min, 4),
    ):
        assert (tmp_path / "found" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        with (tmp_path / "found" / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        (column,) = (each for each in rows[0] if each.startswith(metric))
        results = [float(row[column]) for row in rows]
        assert [row["seed"] for row in rows] == ["0"] * trainings + ["1"] * trainings
        assert len(set(results)) > trainings  # a seed is not the other one again
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


def test_the_contrastive_loss_is_that_of_the_paper(monkeypatch):
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
