"""The tables of the docs on layers without a gradient, and on layers that start at zero."""

import re
from pathlib import Path

import pytest

from benchmarks import unusual_layers
from benchmarks.unusual_layers import FROM_ZERO, UNUSED, fine_tune, left_without_gradient

PAPERS = ["MLPerf's LARS (lr=10, weight_decay=2e-4)", "LAMB(lr=0.01, weight_decay=0.01)"]
PAGE = (Path(__file__).parents[2] / "docs/trust_ratios.md").read_text()


def test_the_page_shows_the_remaining_norm_of_a_layer_without_a_gradient():
    told = re.findall(r"^\| [^|]+ \| ([0-9.]+) % \|$", PAGE, re.MULTILINE)
    assert told == [f"{100 * left_without_gradient(build):.1f}" for build in UNUSED.values()]


@pytest.mark.parametrize(
    "name", ["MLPerf's LARS (lr=10, weight_decay=2e-4)", "LAMB(lr=0.01, weight_decay=0.01)"]
)
def test_the_remedy_leaves_only_the_plain_decay(name):
    settings = UNUSED[name].keywords
    left = left_without_gradient(lambda params: UNUSED[name](params, decoupled_weight_decay=True))
    assert left == pytest.approx((1 - settings["lr"] * settings["weight_decay"]) ** 100, rel=1e-4)


@pytest.fixture(scope="module")
def task():
    images, labels = unusual_layers.digits()
    network = unusual_layers.trained_network(images, labels)
    return network, images.view(-1, 8, 8).transpose(1, 2).reshape(-1, 64), labels


@pytest.mark.parametrize(("plain", "clip"), [("LARS(lr=10", "0.01"), ("LAMB(lr=0.3", "0.1")])
def test_the_clip_keeps_layers_that_start_at_zero_from_jumping(task, plain, clip):
    worst, _ = fine_tune(FROM_ZERO[f"{plain})"], *task)
    assert worst > 5
    worst, _ = fine_tune(FROM_ZERO[f"{plain}, trust_clip={clip})"], *task)
    assert worst < 1.1
