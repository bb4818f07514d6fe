"""The large-batch study keeps its protocol: rates from the small batch alone, carried over by rule."""

import csv
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"
BASE, LARGE, EPOCHS, IMAGES = 32, 128, 2, 512
TOY = [
    *("--dataset=digits", "--model=mlp", f"--epochs={EPOCHS}", f"--train-images={IMAGES}", "--seeds=1"),
    *("--validation-images=256", f"--base-batch-size={BASE}", f"--batch-size={LARGE}", "--rates=2"),
    *("--processes=1", "--lr-window", "--critical-batch-size"),
]


def study(folder):
    command = [sys.executable, str(EXAMPLES / "large_batch_study.py"), "--folder", str(folder), *TOY]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, study(folder)


@pytest.fixture(scope="module")
def runs(toy):
    with (toy[0] / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def of_part(runs, part):
    return [run for run in runs if run["part"] == part]


def chosen(runs, optimizer):
    return max(
        (run for run in of_part(runs, "choice") if run["optimizer"] == optimizer),
        key=lambda run: float(run["validation"]),
    )


CHOICE = ("base_lr", "excluded_lr_scale", "options", "base_batch_size")


def test_every_grid_runs_at_the_small_batch_and_before_the_large_one_is_seen(runs):
    parts = [run["part"] for run in runs]
    choices = of_part(runs, "choice")
    assert parts[: len(choices)] == ["choice"] * len(choices)
    assert {(run["batch_size"], run["rule"]) for run in choices} == {(str(BASE), "none")}
    by_optimizer = {name: [run for run in choices if run["optimizer"] == name] for name in
                    ("SGD", "AdamW", "LARS", "LAMB")}  # fmt: skip
    for name, of in by_optimizer.items():
        assert len({run["base_lr"] for run in of}) == 2, name
        assert len({run["excluded_lr_scale"] for run in of}) == (3 if name == "LARS" else 2), name


def test_only_results_see_the_test_images(runs):
    assert {run["part"] for run in runs if run["test"]} == {"result"}
    assert all(run["test"] for run in of_part(runs, "result"))
    assert {run["seed"] for run in of_part(runs, "result")}.isdisjoint(
        run["seed"] for run in of_part(runs, "choice")
    )


def test_what_was_chosen_is_carried_over_by_rule(runs):
    """The peak is what the steps used, not what the script asked for."""
    factors = {"none": 1.0, "linear": LARGE / BASE, "sqrt": (LARGE / BASE) ** 0.5}
    carried = [run for run in of_part(runs, "result") if run["base_batch_size"] == str(BASE)]
    assert [
        (run["optimizer"], run["rule"], run["batch_size"]) for run in carried if run["rule"] in factors
    ] == [
        ("SGD", "none", str(BASE)),
        ("SGD", "linear", str(LARGE)),
        ("SGD", "sqrt", str(LARGE)),
        ("AdamW", "sqrt", str(LARGE)),
        ("LARS", "sqrt", str(LARGE)),
        ("LAMB", "sqrt", str(LARGE)),
    ]
    for run in carried:
        best = chosen(runs, run["optimizer"])
        assert [run[key] for key in CHOICE] == [best[key] for key in CHOICE]
        rule = run["rule"]
        factor = factors[rule] if rule in factors else (LARGE / BASE) ** float(rule)
        assert float(run["peak_lr"]) == pytest.approx(factor * float(best["base_lr"]), rel=1e-9)


def test_the_one_row_that_was_tuned_at_the_large_batch_says_so(runs, toy):
    tuned = [run for run in of_part(runs, "result") if run["base_batch_size"] != str(BASE)]
    (row,) = tuned
    assert (row["optimizer"], row["base_batch_size"], row["batch_size"]) == ("SGD", str(LARGE), str(LARGE))
    best = max(of_part(runs, "upper bound"), key=lambda run: float(run["validation"]))
    assert row["base_lr"] == best["base_lr"]
    # The table may break the name over lines.
    assert "re-tuned" in toy[1]
    assert "bound" in toy[1]


def test_all_have_the_same_number_of_epochs(runs):
    assert {(int(run["batch_size"]), int(run["steps"])) for run in runs} == {
        (size, EPOCHS * (IMAGES // size)) for size in (BASE, 64, LARGE)
    }


def test_the_noise_scale_is_measured_at_the_small_batch(runs, toy):
    (run,) = of_part(runs, "noise scale")
    assert (run["batch_size"], run["accumulated_batches"]) == (str(BASE), "2")
    best = chosen(runs, "SGD")
    assert [run[key] for key in CHOICE] == [best[key] for key in CHOICE]
    printed = re.search(rf"Noise scale of SGD at batch {BASE}, after every\s+epoch:\s+(\d+)", toy[1])
    assert int(printed[1]) == round(float(run["noise_scales"].strip("[]").split(",")[0]))


def test_csv_and_pictures(runs, toy):
    assert list(runs[0]) == [
        *("model", "data", "epochs", "train_images", "validation_images", "part", "optimizer", "base_lr"),
        *(
            "base_batch_size",
            "excluded_lr_scale",
            "options",
            "batch_size",
            "accumulated_batches",
            "rule",
            "seed",
        ),
        *("steps", "peak_lr", "validation", "test", "noise_scales", "cpu_seconds"),
    ]
    for name in ("results", "lr_window", "critical_batch_size"):
        assert (toy[0] / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", name


def test_a_study_goes_on_where_it_stopped(toy):
    folder, printed = toy
    path = folder / "runs.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    again = study(folder)
    assert path.read_text().splitlines()[:-2] == [line.rstrip() for line in lines[:-2]]
    assert len(path.read_text().splitlines()) == len(lines)
    tables = [text[text.index("At batch") :].split("Noise scale at")[0] for text in (printed, again)]
    assert tables[0] == tables[1]


def test_a_window_ends_where_accuracy_crosses_the_bound(module):
    report = module("study_report")
    accuracy = {1.0: 80.0, 2.0: 84.0, 4.0: 86.0, 8.0: 84.0, 16.0: 90.0, 32.0: 70.0}
    found = report.window(accuracy, 85.0)  # 4 reaches it too, but not what lies between
    assert (found.low, found.high) == pytest.approx((8.0 * 2 ** (1 / 6), 16.0 * 2 ** (1 / 4)))
    assert not found.is_open
    assert report.window(accuracy, 60.0).is_open
    assert str(report.window(accuracy, 60.0)) == "1 to 32, at least 32.0 times"
    assert report.window(accuracy, 91.0) is None


def test_the_rate_by_the_noise_scale_lies_between_none_and_the_linear_rule(module):
    exponent = module("large_batch_study").noise_scale_exponent
    assert exponent(1e9, 128, 2048) == pytest.approx(1.0, abs=1e-4)
    assert exponent(1e-3, 128, 2048) == pytest.approx(0.0, abs=1e-4)
    # lr_max / (1 + 512 / 2048) over lr_max / (1 + 512 / 128)
    assert 16 ** exponent(512, 128, 2048) == pytest.approx(4.0)


def test_the_networks_are_what_the_page_says(module):
    network = module("study_training").network
    cnn, mlp = network("cnn", 28), network("mlp", 28)
    assert sum(p.numel() for p in cnn.parameters()) == 6306
    assert cnn(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert {type(layer) for layer in mlp} == {nn.Flatten, nn.Linear, nn.ReLU}
    assert mlp(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_choice_is_the_best_or_the_lowest_rate_near_it(module):
    choose = module("large_batch_study").lowest_of_the_best
    choice = module("study_training").Choice
    seen = {
        choice("LARS", 2.0): 87.0,
        choice("LARS", 4.0): 88.4,
        choice("LARS", 4.0, excluded_lr_scale=0.1): 88.3,
        choice("LARS", 8.0): 88.5,
        choice("SGD", 0.1): 80.0,
    }
    assert choose(seen, 0.0) == {"LARS": choice("LARS", 8.0), "SGD": choice("SGD", 0.1)}
    assert choose(seen, 0.15)["LARS"] == choice("LARS", 4.0)
    assert choose(seen, 0.25)["LARS"] == choice("LARS", 4.0, excluded_lr_scale=0.1)
