"""The contents of the plots, not their looks."""

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lightning_lars import TrustRatioMonitor
from lightning_lars.trust_ratios.history import TrustRatioHistory
from lightning_lars.trust_ratios.layer_labels import layer_labels
from lightning_lars.trust_ratios.layer_statistics import OverSteps
from lightning_lars.trust_ratios.plot import (
    plot_effective_lr,
    plot_history,
    plot_trust_ratios,
    save_picture,
)
from tests.support.heatmap import cells

RESNET = [f"layer{i}.{j}.conv{k}.weight" for i in range(1, 5) for j in range(5) for k in (1, 2, 3)]
TRANSFORMER = [
    f"model.encoder.layer.{i}.{part}.weight"
    for i in range(66)
    for part in ("attention.query", "attention.key", "attention.value", "attention.output", "up", "down")
]
BERT = ["embeddings.words.weight", "embeddings.positions.weight", *TRANSFORMER, "head.weight"]
FLAT = [f"params.{i}" for i in range(400)]
FEW = ["conv1.weight", "conv2.weight", "fc.weight"]


def recorded(layers, ratio=0.01, lr=2.0, steps=(10, 20, 30)):
    """A history in which every layer has the ratios that a function of step and its position tells."""
    history = TrustRatioHistory()
    history.set_order(layers)
    for step in steps:
        values = {
            name: ratio(step, i) if callable(ratio) else ratio * (i + 1) for i, name in enumerate(layers)
        }
        history.record(
            step,
            {
                "trust_ratio": {name: OverSteps(*[value] * 3) for name, value in values.items()},
                "effective_lr": {name: OverSteps(*[lr * value] * 3) for name, value in values.items()},
            },
        )
    return history


def test_the_heat_map_shows_layers_from_the_top_over_steps_on_a_logarithmic_scale():
    _, ax = plot_trust_ratios(recorded(FEW))
    mesh, not_finite = ax.collections
    assert cells(mesh).tolist() == [[0.01] * 3, [0.02] * 3, [0.03] * 3]
    assert isinstance(mesh.norm, LogNorm)
    assert not_finite.get_array().count() == 0
    assert [label.get_text() for label in ax.get_yticklabels()] == ["conv1", "conv2", "fc"]
    assert ax.get_yticks().tolist() == [0.5, 1.5, 2.5]
    assert ax.get_ylim() == (3, 0)
    assert ax.get_xlim() == (0, 30)


def test_non_finite_cells_are_red_and_missing_values_empty():
    history = recorded(FEW, lambda step, i: math.nan if i == 1 and step > 10 else 0.01 * (i + 1))
    history.record(40, {"trust_ratio": {"fc.weight": OverSteps(1.0, 1.0, 1.0)}})
    _, ax = plot_trust_ratios(history)
    mesh, not_finite = ax.collections
    assert cells(mesh).mask.tolist() == [
        [False, False, False, True],
        [False, True, True, True],
        [False] * 4,
    ]
    assert (~cells(not_finite).mask).tolist() == [
        [False] * 4,
        [False, True, True, False],
        [False] * 4,
    ]


@pytest.mark.parametrize("ratio", [0.0, math.nan, 1.0])
def test_ratios_that_are_all_zero_or_not_finite_or_the_same_can_be_drawn(tmp_path, ratio):
    save_picture(recorded(FEW, lambda step, i: ratio), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_lines_are_the_effective_learning_rates_in_front_of_the_schedule():
    figure, ax = plot_effective_lr(recorded(FEW))
    lines = ax.get_lines()
    assert [line.get_ydata().tolist() for line in lines] == [
        pytest.approx([0.02] * 3),
        pytest.approx([0.04] * 3),
        pytest.approx([0.06] * 3),
    ]
    assert [line.get_label() for line in lines] == FEW
    (behind,) = (each for each in figure.axes if each is not ax)
    assert behind.get_zorder() < ax.get_zorder()
    heights = behind.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(2.0)


def overlaps(axes):
    """Pairs of labels beside the rows that are printed over each other."""
    renderer = axes.figure.canvas.get_renderer()
    boxes = sorted(
        (label.get_window_extent(renderer) for label in axes.get_yticklabels()), key=lambda box: box.y0
    )
    return [(below, above) for below, above in pairwise(boxes) if below.y1 > above.y0]


@pytest.mark.parametrize(
    "layers",
    [FEW, RESNET, pytest.param(TRANSFORMER, marks=pytest.mark.slow), BERT, FLAT],
    ids=["few", "60", "396 in blocks", "399 with some between", "400 in none"],
)
def test_labels_do_not_overlap_and_stay_in_the_plot(layers):
    figure, (above, below) = plot_history(recorded(layers))
    figure.draw_without_rendering()
    assert overlaps(above) == []
    renderer = figure.canvas.get_renderer()
    assert min(label.get_window_extent(renderer).x0 for label in above.get_yticklabels()) >= 0
    left, right = ([axes.get_window_extent().x0, axes.get_window_extent().x1] for axes in (above, below))
    assert left == pytest.approx(right, abs=1)
    assert np.prod(figure.get_size_inches()) < 10 * 18


@pytest.mark.parametrize(
    ("layers", "texts", "rows"),
    [
        (FEW, ["conv1", "conv2", "fc"], [1, 1, 1]),
        (RESNET, [name.removesuffix(".weight") for name in RESNET], [1] * 60),
        ([*RESNET, "fc.weight"], [*(f"layer{i}.{j}" for i in range(1, 5) for j in range(5)), "fc"], None),
        (TRANSFORMER, [f"model.encoder.layer.{i}" for i in range(0, 66, 2)], [6] * 33),
        (FLAT, [f"params.{i}" for i in range(0, 400, 7)], [1] * 58),
        (["weight", "bias"], ["weight", "bias"], [1, 1]),
        (["a." + "x" * 60 + ".weight"], ["a." + "x" * 21 + "…" + "x" * 24], [1]),
    ],
)
def test_layers_are_named_by_their_distinguishing_parts(layers, texts, rows):
    labels = layer_labels(layers)
    assert [label.text for label in labels] == texts
    assert rows is None or [label.rows for label in labels] == rows


@pytest.mark.parametrize(("layers", "alpha"), [(FEW, 1.0), (RESNET, 0.7), (RESNET * 2, 0.35), (FLAT, 0.25)])
def test_lines_that_are_many_do_not_hide_each_other(layers, alpha):
    layers = [f"{i}.{name}" for i, name in enumerate(layers)]
    _, ax = plot_effective_lr(recorded(layers))
    lines = ax.get_lines()
    assert len(lines) == len(layers)
    assert {line.get_color()[3] for line in lines} == {alpha}
    from_top = sorted(range(len(lines)), key=lambda i: -lines[i].get_zorder())
    assert len(layers) < 10 or len({i * 10 // len(layers) for i in from_top[:20]}) == 10


@pytest.mark.parametrize("is_inside", [False, True], ids=["figure", "subfigure"])
def test_draws_in_axes_that_are_given(is_inside):
    figure = Figure()
    FigureCanvasAgg(figure)
    part = figure.subfigures(1, 2)[0] if is_inside else figure
    given = part.subplots()
    assert plot_trust_ratios(recorded(FEW), given) == (figure, given)
    assert plot_effective_lr(recorded(FEW), part.subplots())[0] is figure


@pytest.mark.parametrize("plot", [plot_history, plot_trust_ratios, plot_effective_lr])
def test_plots_are_pyplot_figures_which_notebooks_and_show_display(plot):
    figure, _ = plot(recorded(FEW))
    assert [pyplot.figure(number) for number in pyplot.get_fignums()] == [figure]


def test_saving_a_plot_opens_no_pyplot_figure(tmp_path):
    save_picture(recorded(FEW), tmp_path / "picture.png")
    assert pyplot.get_fignums() == []
    width, height = pyplot.imread(tmp_path / "picture.png").shape[1::-1]
    figure, _ = plot_history(recorded(FEW))
    assert (figure.get_size_inches() * 150).tolist() == pytest.approx([width, height], abs=1)


@pytest.mark.parametrize("plot", [plot_history, plot_trust_ratios, plot_effective_lr])
def test_without_records_says_what_to_do(plot):
    with pytest.raises(ValueError, match="nothing to plot: no step of an optimizer"):
        plot(TrustRatioHistory())


def test_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^picture needs matplotlib: pip install 'lightning-lars\[plot\]'"
    ):
        TrustRatioMonitor(picture="picture.png")
    with pytest.raises(ModuleNotFoundError, match=r"^plot needs matplotlib"):
        plot_history(recorded(FEW))


@pytest.mark.parametrize("picture", ["picture", "picture.xyz", 3, True, ""])
def test_a_file_that_nothing_can_be_drawn_into_is_refused(picture):
    with pytest.raises(ValueError, match="picture must be a file name that ends in"):
        TrustRatioMonitor(picture=picture)
