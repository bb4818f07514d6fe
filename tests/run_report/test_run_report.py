"""Reports of runs, from what the runs have left."""

import csv
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from lightning_lars import LARS, GradientNoiseScale, TrustRatioMonitor
from lightning_lars.run_report.charts import line_chart
from lightning_lars.run_report.checkpoint import read_checkpoint
from lightning_lars.run_report.command import main, write_report
from lightning_lars.run_report.csv_log import read_csv_log
from lightning_lars.run_report.heatmap import MOST_COLUMNS, heatmap
from lightning_lars.run_report.notes import notes
from lightning_lars.run_report.page import page
from lightning_lars.run_report.run import Run
from tests.support.boring import Boring, LogsLoss, trainer


class Logging(LogsLoss, Boring):
    """Logs its loss."""


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The log and the checkpoint of a run, with the values of a layer that the monitor itself holds."""
    folder = tmp_path_factory.mktemp("run")
    monitor = TrustRatioMonitor("*", picture=folder / "picture.png")
    callbacks = [monitor, LearningRateMonitor("step"), GradientNoiseScale(every_n_steps=1)]
    fitting = trainer(
        folder,
        callbacks=callbacks,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        accumulate_grad_batches=2,
        max_epochs=2,
    )
    torch.manual_seed(0)
    fitting.fit(Logging(optimizer=partial(LARS, lr=2.0, weight_decay=0.1), excluded_lr=0.05, width=12))
    fitting.save_checkpoint(folder / "last.ckpt")
    return folder, monitor._history


def heatmaps(text):
    return [json.loads(data) for data in re.findall(r'application/json">(.*?)</script>', text, re.DOTALL)]


class Tags(HTMLParser):
    """Checks that tags close in order, and collects what they would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded = [], []

    def handle_starttag(self, tag, attributes):
        if tag != "meta":
            self.open.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href", "action")]

    def handle_startendtag(self, tag, attributes):
        assert tag in ("line", "polyline", "circle")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(text):
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.loaded == []
    assert not re.search(r"https?:|@import|url\(|fetch\(", text)


def test_a_log_holds_the_numbers_of_the_run(left):
    folder, history = left
    run = read_csv_log(folder)
    assert list(run.layers["trust_ratio"]) == ["net.0.weight", "net.2.weight"]
    for layer, values in history.series("trust_ratio").items():
        assert list(run.layers["trust_ratio"][layer].values()) == pytest.approx(values)
    assert set(run.metrics["lr-LARS/excluded"].values()) == {0.05}
    assert {"loss", "trust_ratio/median", "gradient_noise_scale/tr_sigma"} <= set(run.metrics)
    assert "epoch" not in run.metrics
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert list(run.metrics["loss"].values()) == pytest.approx(losses)
    assert run.settings["width"] == "12"


def test_a_checkpoint_holds_groups_versions_and_the_history(left):
    folder, history = left
    run = read_checkpoint(folder / "last.ckpt")
    kept = {name: list(points.values()) for name, points in run.layers["trust_ratio"].items()}
    assert kept == history.series("trust_ratio")
    assert [list(vars(group).values()) for group in run.groups] == [
        ["", "adapted", "2", "72", "2", "0.1", "yes"],
        ["", "excluded", "4", "38", "0.05", "0", "no"],
    ]
    assert run.settings["optimizer steps"] == "8"
    assert run.settings["width"] == "12"
    assert re.match(r"\d+\.\d+", run.settings["Lightning"])


def test_the_report_of_both_shows_everything_once_and_loads_nothing(left, tmp_path):
    folder, history = left
    output = tmp_path / "report.html"
    write_report([folder, folder / "last.ckpt"], output)
    text = output.read_text()
    check(text)
    for heading in (
        "Learning rates",
        "Layers",
        "Gradient noise scale",
        "Metrics",
        "Parameter groups",
        "Settings",
    ):
        assert text.count(f"<h2>{heading}</h2>") == 1
    [ratios, rates, updates] = heatmaps(text)
    assert ratios["layers"] == ["net.0.weight", "net.2.weight"]
    assert ratios["steps"] == updates["steps"] == list(range(0, 8))
    expected = [[float(f"{value:.4g}") for value in of] for of in history.series("trust_ratio").values()]
    assert ratios["values"] == expected
    assert ratios["limits"][0] < ratios["limits"][1]
    assert len(rates["values"]) == 2


class Watched(Logging):
    """With hyperparameters."""


def test_the_monitor_writes_a_report_with_its_warnings_when_training_ends(tmp_path):
    module = Watched(optimizer=partial(LARS, lr=0.1), width=12)
    options = {"log_every_n_steps": 1, "max_epochs": 1}
    fitting = trainer(tmp_path, callbacks=[TrustRatioMonitor(report="reports/run.html")], **options)
    with pytest.warns(UserWarning, match="LARS needs a larger learning rate than SGD"):
        fitting.fit(module)
    text = (tmp_path / "reports/run.html").read_text()
    check(text)
    assert text.count("LARS needs a larger learning rate than SGD") == 1
    for cell in ("adapted", "72", "width", "12", "optimizer steps", "8", "lightning-lars", "Watched"):
        assert f">{cell}<" in text
    ratios = heatmaps(text)[0]
    assert ratios["layers"] == ["net.0.weight", "net.2.weight"]
    assert ratios["steps"] == list(range(1, 9))
    assert "Learning rate of each group" in text


@pytest.mark.filterwarnings("ignore:trust_coefficient")
def test_the_monitor_writes_the_report_of_a_run_that_failed_and_never_stops_one(tmp_path):
    class Failing(Watched):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("no more")

    options = {"log_every_n_steps": 1, "max_epochs": 1}
    with pytest.raises(RuntimeError, match="no more"):
        trainer(tmp_path, callbacks=[TrustRatioMonitor(report="run.html")], **options).fit(Failing())
    assert heatmaps((tmp_path / "run.html").read_text())[0]["steps"] == [1, 2, 3]
    (tmp_path / "taken").touch()
    with pytest.warns(UserWarning, match=r"could not save its report .*taken"):
        trainer(tmp_path, callbacks=[TrustRatioMonitor(report="taken/run.html")], **options).fit(Watched())


@pytest.mark.filterwarnings("ignore:trust_coefficient")
def test_a_hyperparameter_that_is_no_text_does_not_end_the_run(tmp_path):
    module = Watched(width=12)
    module.save_hyperparameters({"folder": "half of a pair: \udcff"})
    trainer(tmp_path, callbacks=[TrustRatioMonitor(report="run.html")], log_every_n_steps=1).fit(module)
    assert "half of a pair: \\udcff" in (tmp_path / "run.html").read_text()


@pytest.mark.parametrize("value", ["run.txt", "", 3, "run"])
def test_a_report_is_an_html_file(value):
    with pytest.raises(ValueError, match=f"report must be a file name that ends in .html, got {value!r}"):
        TrustRatioMonitor(report=value)


def test_a_report_changes_no_state_key_of_monitors_without_one():
    assert "report" not in TrustRatioMonitor(picture="a.png").state_key
    assert TrustRatioMonitor().state_key != TrustRatioMonitor(report="a.html").state_key
    assert TrustRatioMonitor(report="a.html").state_dict() != {}


def test_names_are_text_and_no_markup(tmp_path):
    nasty = "</script><script>alert('1')</script>&"
    layers = {"trust_ratio": {nasty: {0: 1.0, 1: math.inf}}}
    text = page(Run(metrics={nasty: {0: 1.0}}, layers=layers, settings={nasty: nasty}), nasty)
    check(text)
    assert "alert('1')</script>" not in text
    [data] = heatmaps(text)
    assert data["layers"] == [nasty]


def test_a_heatmap_marks_what_is_missing_or_not_finite_and_has_a_limited_width():
    many = {step: 1.0 + step for step in range(3 * MOST_COLUMNS + 1)}
    [data] = heatmaps(
        heatmap("Ratios", {"first": {0: math.nan, 4: 0.0, 8: -1.0, 12: math.inf}, "second": many})
    )
    assert data["values"][0][:5] == ["inf", None, None, "inf", None]
    assert len(data["steps"]) == len(data["values"][1]) <= MOST_COLUMNS
    [data] = heatmaps(heatmap("Ratios", {"all": {0: 0.5}}))
    assert data["limits"][0] < 0.5 < data["limits"][1]


@pytest.mark.parametrize(
    ("points", "heights", "scale"),
    [
        ({0: 1.0, 5: 3.0, 10: 2.0}, [0.0, 1.0, 0.5], ""),
        ({0: 0.001, 5: 0.1, 10: 10.0}, [0.0, 0.5, 1.0], " (logarithmic)"),
        ({0: 4.0, 10: 4.0}, [0.5, 0.5], ""),
        ({0: 0.0, 3: math.nan, 10: 1.0}, [0.0, 1.0], ""),
    ],
)
def test_a_chart_draws_values_to_scale(points, heights, scale):
    chart = line_chart("Loss", {"loss": points})
    check(chart)
    assert f"<h3>Loss{scale}</h3>" in chart
    drawn = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="(.*?)"', chart)[1].split()]
    assert [round((216 - y) / 206, 2) for _, y in drawn] == heights
    assert (drawn[0][0], drawn[-1][0]) == (70.0, 870.0)


def test_a_chart_of_one_or_no_value_is_drawn_too():
    assert "<circle" in line_chart("Loss", {"loss": {7: 1.0}})
    assert "No finite value" in line_chart("Loss", {"loss": {7: math.nan}})


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (Run(metrics={"loss": {0: 1.0, 4: math.nan}}), "loss is not finite from step 4 on."),
        (
            Run(metrics={"trust_ratio/at_trust_clip": {0: 0.0, 4: 0.25}}),
            "25% of the layers were at",
        ),
        (
            Run(metrics={"trust_ratio/LARS/at_zero_rule": {0: 1.0}}),
            "100% of the layers had a",
        ),
        (
            Run(layers={"trust_ratio": {"a": {0: 1.0}, "b": {0: math.inf}}}),
            "Trust ratios of b are not",
        ),
        (
            Run(layers={"trust_ratio": {"a": {0: 1.0}, "b": {0: 1.1}, "c": {0: 99.0}}}),
            "Trust ratios of c are far from 1.1",
        ),
        (Run(metrics={"loss": {0: 1.0}, "trust_ratio/at_trust_clip": {0: 1.0, 1: 0.0}}), None),
    ],
)
def test_says_what_stands_out(run, told):
    found = notes(run)
    assert len(found) == (told is not None)
    assert all(told in sentence for sentence in found)
    assert ("Nothing in these numbers." in page(run, "A run")) == (told is None)


def test_one_value_that_is_not_finite_is_not_the_end():
    assert notes(Run(metrics={"loss": {0: 1.0, 1: math.nan, 2: 1.0, 3: math.inf, 4: 2.0}})) == [
        "loss is not finite in 2 of 5 values, first at step 1."
    ]
    assert notes(Run(metrics={"loss": {0: 1.0, 1: math.nan, 2: math.nan}})) == [
        "loss is not finite from step 1 on."
    ]


def test_the_command_writes_the_report_and_says_what_is_wrong(left, tmp_path, monkeypatch, capsys):
    folder, _ = left
    output = str(tmp_path / "report.html")
    monkeypatch.setattr(sys, "argv", ["lightning_lars", "report", str(folder / "metrics.csv"), "-o", output])
    runpy.run_module("lightning_lars", run_name="__main__")
    assert capsys.readouterr().out == f"wrote {output}\n"
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    words = tmp_path / "words.csv"
    words.write_text("step,loss\n1,high\n")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.ckpt")
    unsafe = {"pytorch-lightning_version": "2.6", "hyper_parameters": {"function": partial(print)}}
    torch.save(unsafe, tmp_path / "unsafe.ckpt")
    broken = {
        "long.csv": (b"step,loss\n1,2,3\n", "must have a column for every value, got more in line 2"),
        "half.csv": (b"step,loss\n1.5,2\n", "must hold integers in the column 'step', got '1.5'"),
        "wide.csv": ("step,loss\n".encode("utf-16"), r"wide.csv must be a CSV log .* in UTF-8"),
        "quote.csv": (b'step,"' + b"a" * 200_000, "quote.csv must be a CSV log of Lightning"),
        "empty.ckpt": (b"", "empty.ckpt must be a metrics.csv or a checkpoint of Lightning"),
        "text.ckpt": (b"step,loss\n1,2\n", "text.ckpt must be a metrics.csv or a checkpoint of Lightning"),
        "cut.ckpt": ((folder / "last.ckpt").read_bytes()[:900], "cut.ckpt must be .* cannot read"),
    }
    for name, (data, _) in broken.items():
        (tmp_path / name).write_bytes(data)
    for source, message in (
        *((tmp_path / name, message) for name, (_, message) in broken.items()),
        (tmp_path / "none.csv", "there is no .*none.csv"),
        (other, r"with a column 'step', got the columns \['a', 'b'\]"),
        (words, "must hold numbers, got 'high' as 'loss'"),
        (tmp_path / "other.ckpt", "must be a checkpoint of Lightning"),
        (tmp_path / "unsafe.ckpt", "pass --no-weights-only"),
    ):
        with pytest.raises(SystemExit):
            main([str(source), "-o", output])
        assert re.search(message, capsys.readouterr().err, re.DOTALL), source
    main([str(tmp_path / "unsafe.ckpt"), "-o", output, "--no-weights-only"])
    assert "functools.partial" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match="at least one"):
        write_report([], output)


def test_the_report_does_not_replace_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "metrics.csv"
    log.write_text("step,loss\n0,1\n")
    for output in ("metrics.csv", log, "./metrics.csv"):
        with pytest.raises(ValueError, match="output must be another file than the sources"):
            write_report(["metrics.csv"], output)
    assert log.read_text() == "step,loss\n0,1\n"
    write_report(["metrics.csv"], "new/folder/report.html")
    assert (tmp_path / "new/folder/report.html").exists()


def test_a_log_that_a_spreadsheet_has_saved_is_read(tmp_path):
    (tmp_path / "METRICS.CSV").write_bytes("\ufeffstep,loss\r\n10.0,1.5\r\n".encode())
    write_report([tmp_path / "METRICS.CSV"], tmp_path / "report.html")
    assert read_csv_log(tmp_path / "METRICS.CSV").metrics == {"loss": {10: 1.5}}


def test_checkpoints_with_extra_state_and_the_history_of_another_callback_are_read(tmp_path):
    state = {"head.weight": torch.ones(3), "head._extra_state": {"seen": 1}}
    groups = [{"params": [0], "param_names": ["head.weight"], "lr": torch.tensor(0.5)}]
    checkpoint = {
        "pytorch-lightning_version": "2.6",
        "state_dict": state,
        "optimizer_states": [{"state": {}, "param_groups": groups}],
        "callbacks": {"Losses": {"history": {"series": [1.0, 2.0], "steps": [1, 2]}}},
        "hyper_parameters": {1: "one"},
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    run = read_checkpoint(tmp_path / "last.ckpt")
    assert (run.groups[0].elements, run.groups[0].lr) == ("3", "0.5")
    assert run.settings["1"] == "one"
    assert run.layers == {}


def test_metrics_beside_those_of_the_monitor_are_shown():
    keys = ("gradient_norm/total", "trust_ratio/mine", "gradient_norm", "effective_lr_of_head")
    text = page(Run(metrics={key: {0: 1.0} for key in keys}), "A run")
    assert all(f"<h3>{key}</h3>" in text for key in keys)
    assert "Layers" not in text
    of_monitor = {f"trust_ratio/{name}": {0: 0.5} for name in ("min", "median", "max", "at_trust_clip")}
    text = page(Run(metrics=of_monitor), "A run")
    assert "<h2>Layers</h2>" in text
    assert "<h2>Metrics</h2>" not in text


def test_layers_are_in_the_order_of_their_numbers(tmp_path):
    names = [f"net.{i}.weight" for i in (0, 2, 10)]
    columns = ["step", *(f"trust_ratio_per_layer/{name}" for name in sorted(names))]
    (tmp_path / "metrics.csv").write_text(f"{','.join(columns)}\n0,1,1,1\n")
    assert list(read_csv_log(tmp_path).layers["trust_ratio"]) == names


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no browser to look at the page with")
def test_a_browser_draws_the_heatmaps_without_an_error(left, tmp_path):
    folder, _ = left
    output = tmp_path / "report.html"
    write_report([folder], output)
    # A page that reports its errors, and what it has drawn, in its title.
    script = """<script>
    const drawn = [...document.querySelectorAll("canvas")].map(c => {
      const box = c.getBoundingClientRect();
      c.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + 1, clientY: box.bottom - 1}));
      const pixels = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
      return pixels.some(value => value) + " " + c.parentNode.querySelector("output").textContent;
    });
    document.title = drawn.join("|");
    </script></body>"""
    output.write_text(output.read_text().replace("</body>", script))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user"]
    shown = subprocess.run(
        [*command, "--dump-dom", output.as_uri()], capture_output=True, text=True, timeout=60
    )
    title = re.search(r"<title>(.*?)</title>", shown.stdout)[1]
    assert re.fullmatch(r"(true net\.2\.weight, step 0: [\d.e-]+\|?){3}", title), title
