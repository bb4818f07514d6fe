"""Scripted, traced and exported modules are grouped like the original."""

import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_lars import LARS, build_optimizer, explain_param_groups, param_groups

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.*:DeprecationWarning", "ignore:Converting a tensor"
)


def names(module, **options):
    return {group["name"]: [name for name, _ in group["params"]] for group in param_groups(module, **options)}


def rules(module):
    columns = {column.header: list(column.cells) for column in explain_param_groups(module).columns}
    return dict(zip(columns["Name"], zip(columns["Module"], columns["Rule"], strict=True), strict=True))


class OwnRMSNorm(nn.Module):
    """Known by its name alone, with a scale that is no vector."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 4))

    def forward(self, batch):
        return batch @ self.scale


class Activated(nn.BatchNorm1d):
    """Known by its base class alone."""

    def _check_input_dim(self, input):
        """Ask nothing of a batch, which has no value where it is traced."""


class Model(nn.Module):
    """A module of each kind."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))
        self.stem = nn.Linear(1, 4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.activated = Activated(4)
        self.layer_norm = nn.LayerNorm((3, 4))
        self.own = OwnRMSNorm()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.head = nn.Linear(4, 1)

    def forward(self, batch):
        x = self.activated(self.batch_norm(self.stem(batch)))
        x = self.own(self.layer_norm(x))
        return self.head(x + self.gamma * self.blocks[0](x))


BATCH = torch.ones(3, 1)


def scripted(module):
    return torch.jit.script(module)


def traced(module):
    return torch.jit.trace(module, BATCH)


def loaded(module, folder):
    torch.jit.save(torch.jit.script(module), folder / "model.pt")
    return torch.jit.load(folder / "model.pt")


def exported(module):
    return torch.export.export(module, (BATCH,)).module()


def exported_strictly(module):
    return torch.export.export(module, (BATCH,), strict=True).module()


def unflattened(module):
    return torch.export.unflatten(torch.export.export(module, (BATCH,)))


def symbolically_traced(module):
    return torch.fx.symbolic_trace(module)


STAND_INS = [scripted, traced, exported, exported_strictly, unflattened, symbolically_traced]


@pytest.mark.parametrize("stand_in", STAND_INS)
def test_the_groups_match_the_original(stand_in):
    original = Model()
    other = stand_in(Model())
    expected = {group: sorted(held) for group, held in names(original).items()}
    assert {group: sorted(held) for group, held in names(other).items()} == expected
    assert expected["adapted"] == ["blocks.0.weight", "head.weight", "stem.weight"]
    inside = nn.Sequential(other)
    assert {name.removeprefix("0.") for name in names(inside)["adapted"]} == set(expected["adapted"])


@pytest.mark.parametrize("stand_in", STAND_INS)
def test_layers_with_weight_normalization_are_grouped_like_the_original(stand_in):
    """Whose matrix has the shape of a token where there is one output."""
    layers = nn.Linear(1, 4), nn.Conv1d(3, 1, 1)
    module = nn.Sequential(*map(parametrizations.weight_norm, layers))
    assert {group: sorted(held) for group, held in names(stand_in(module)).items()} == {
        "adapted": [f"{i}.parametrizations.weight.original1" for i in (0, 1)],
        "excluded": [f"{i}.{name}" for i in (0, 1) for name in ("bias", "parametrizations.weight.original0")],
    }


@pytest.mark.parametrize("stand_in", STAND_INS)
def test_the_table_names_module_and_rule_of_the_original(stand_in):
    assert {**rules(Model()), "gamma": None} == {**rules(stand_in(Model())), "gamma": None}


def test_a_scripted_module_that_was_loaded_is_grouped_as_the_original(tmp_path):
    other = loaded(Model(), tmp_path)
    assert {group: sorted(held) for group, held in names(other).items()} == {
        group: sorted(held) for group, held in names(Model()).items()
    }


def test_a_scripted_module_whose_code_is_elsewhere_is_recognized_by_names(tmp_path, monkeypatch):
    """As in a process that has never imported it: the base class of Activated is not known."""
    other = loaded(Model(), tmp_path)
    monkeypatch.delitem(sys.modules, Model.__module__)
    assert sorted(names(other)["adapted"]) == ["blocks.0.weight", "head.weight", "stem.weight"]


@pytest.mark.parametrize("stand_in", [scripted, traced, exported, symbolically_traced])
def test_user_types_match_the_original_class_of_a_module(stand_in):
    module = stand_in(Model())
    assert "adapted" not in names(module, exclude=nn.Linear)
    assert "own.scale" in names(module, exclude_norm=False, exclude_gain=False)["adapted"]
    assert (
        "own.scale" in names(module, exclude_norm=False, exclude_gain=False, exclude=OwnRMSNorm)["excluded"]
    )


class Tied(nn.Module):
    """Uses a weight outside of the module that owns it, where a graph does not say what it is part of."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(3, 4)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, batch):
        return batch.expand(3, 4) @ self.tokens.weight.T + self.bias


@pytest.mark.parametrize("stand_in", [exported, unflattened, symbolically_traced])
def test_a_graph_without_module_information_is_refused_with_a_remedy(stand_in):
    module = stand_in(Tied())
    message = (
        r"module must record which module owns each parameter, got 'tokens.weight' in a graph that does not"
    )
    with pytest.raises(ValueError, match=message):
        param_groups(module)
    excluded = names(Tied())["excluded"]
    groups = names(module, exclude_norm=False, exclude_gain=False, exclude=excluded)
    assert groups == {"adapted": ["tokens.weight"], "excluded": ["bias"]}
    module.tokens.requires_grad_(False)
    assert names(module) == {"excluded": ["bias"]}


@pytest.mark.parametrize("stand_in", [scripted, exported, symbolically_traced])
def test_excluded_parameters_are_not_decayed(stand_in):
    module = stand_in(Model())
    optimizer = build_optimizer(module, LARS, lr=1.0, weight_decay=0.1, momentum=0.0)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]
    assert sorted(moved) == ["blocks.0.weight", "head.weight", "stem.weight"]


class Listing(nn.Module):
    """Lists what it does not decay, as timm's models, which can be scripted."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4, 4))

    @torch.jit.ignore
    def no_weight_decay(self):
        return {"table"}

    def forward(self, batch):
        return batch @ self.table


@pytest.mark.parametrize("whole", [True, False])
def test_a_scripted_module_still_lists_what_it_does_not_decay(whole):
    module = torch.jit.script(Listing()) if whole else nn.Sequential(torch.jit.script(Listing()))
    assert list(names(module)) == ["excluded"]
