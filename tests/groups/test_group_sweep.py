"""The sweep over published models, and what it reports for wrong groups."""

import importlib
import sys
from itertools import islice

import pytest
import torch
from torch import nn

from benchmarks import group_sweep
from benchmarks.group_sweep import sweep
from tests.support.peers import PEERS, peer


class Model(nn.Module):
    """A gain, a matrix and a token, and a name for each that misleads."""

    def __init__(self, **shapes):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def found(monkeypatch, **shapes):
    """What the sweep finds where every parameter beside the linear layer is in the other group."""
    classify = group_sweep.classify

    def other(module):
        for layer in classify(module):
            if layer.name.startswith("linear"):
                yield layer
            else:
                group = "excluded" if layer.group == "adapted" else "adapted"
                yield layer._replace(group=group, rule="own")

    monkeypatch.setattr(group_sweep, "classify", lambda module: list(other(module)))
    return sweep([("model", lambda: Model(**shapes))])


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("gamma", (4, 1), "vector or scalar adapted"),
        ("logit_scale", (), "vector or scalar adapted"),
        ("cls_token", (1, 3, 4), "named like a gain, adapted"),
        ("pos_embed", (1, 3, 4), "first dimension 1, adapted"),
        ("kernel", (4, 4), "matrix excluded"),
    ],
)
def test_misplaced_tensors_are_found(monkeypatch, name, shape, reason):
    (kind,) = found(monkeypatch, **{name: shape}).wrong
    assert kind[0] == reason
    assert kind[1].startswith(f"Model.{name} (")


def test_differences_from_the_models_own_lists_are_counted_by_rule():
    def build():
        model = Model(pos_embed=(1, 3, 4), gamma=(4,), table=(9, 2))
        model.no_weight_decay = lambda: {"table"}
        return model

    swept = sweep([("model", build), ("broken", lambda: 1 / 0)])
    assert swept.differs == {("excluded here, decays by the model's own groups", "gain"): ["model"]}
    assert swept.rules == {
        "adapted": 1,
        "excluded by bias": 1,
        "excluded by gain": 2,
        "excluded by no_weight_decay": 1,
    }
    assert swept.failed == {"broken": "ZeroDivisionError: division by zero"}


@pytest.fixture
def _timm(monkeypatch):
    """The whole package, where other tests import single modules of it."""
    peer("timm==1.0.31", "timm.scheduler.scheduler")
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(PEERS / "timm-1.0.31"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.usefixtures("_timm")
@pytest.mark.filterwarnings("ignore")
def test_no_part_of_timm_is_in_the_wrong_group():
    swept = sweep(islice(group_sweep.timm_models("", every=True), 0, None, 30))
    assert len(swept.built) > 40
    assert not swept.failed
    assert not {kind for kind in swept.wrong if kind[0] != "matrix excluded as a gain"}
    assert {kind for kind, _ in swept.differs} <= {"excluded here, decays by the model's own groups"}
    assert "torchvision" not in sys.modules


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_part_of_the_families_of_transformers_is_in_the_wrong_group():
    pytest.importorskip("transformers")
    importlib.import_module("transformers")
    swept = sweep(group_sweep.transformers_models("", every=False))
    assert len(swept.built) > 20
    expected = {"matrix excluded as a gain", "matrix excluded", "named like a gain, adapted"}
    assert {reason for reason, _ in swept.wrong} <= expected
    for reason, kind in swept.wrong:
        if reason == "matrix excluded":
            assert "bias" in kind
        if reason == "named like a gain, adapted":
            assert "table" in kind or "biases" in kind or "Experts" in kind
