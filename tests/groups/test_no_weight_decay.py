"""Parameters that a model lists in no_weight_decay() are excluded."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_lars import explain_param_groups, param_groups
from tests.support.boring import Boring


def names(module, **options):
    return {group["name"]: [name for name, _ in group["params"]] for group in param_groups(module, **options)}


class Transformer(nn.Module):
    """Has tables that no rule would exclude."""

    listed = ("table",)

    def __init__(self, listed=None):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(9, 2))
        self.tokens = nn.Embedding(5, 4)
        self.net = nn.Linear(4, 4, bias=False)
        if listed is not None:
            self.listed = listed

    def no_weight_decay(self):
        return self.listed


@pytest.mark.parametrize(
    ("listed", "excluded"),
    [
        ({"table"}, ["table"]),
        (["table", "tokens"], ["table", "tokens.weight"]),
        (("tokens.weight", "no such thing"), ["tokens.weight"]),
        (dict.fromkeys(["net"]), ["net.weight"]),
        (set(), []),
        (["tab", "token", "net.w", ""], []),
        ("table", []),
        (None, ["table"]),
        (True, []),
    ],
    ids=[
        "name",
        "name and module",
        "stale",
        "keys",
        "nothing",
        "no whole name",
        "no list",
        "of the class",
        "a flag",
    ],
)
def test_names_and_modules_are_excluded(listed, excluded):
    every = ["table", "tokens.weight", "net.weight"]
    expected = {"adapted": [name for name in every if name not in excluded], "excluded": excluded}
    assert names(Transformer(listed)) == {group: held for group, held in expected.items() if held}


def test_a_submodule_lists_its_own_names():
    module = nn.ModuleDict({"a": Transformer({"table"}), "b": Transformer({"tokens"}), "c": nn.Linear(2, 2)})
    assert names(module)["excluded"] == ["a.table", "b.tokens.weight", "c.bias"]


def test_a_lightning_module_around_such_a_model_takes_over_what_it_lists():
    module = Boring()
    module.net = Transformer()
    groups = module.configure_optimizers().param_groups
    assert [group["param_names"] for group in groups] == [
        ["net.tokens.weight", "net.net.weight"],
        ["net.table"],
    ]


def test_the_rule_is_named():
    columns = {column.header: list(column.cells) for column in explain_param_groups(Transformer()).columns}
    assert columns["Rule"] == ["no_weight_decay", "", ""]


def test_no_switch_overrules_the_model():
    off = dict.fromkeys(["exclude_norm", "exclude_bias", "exclude_gain"], False)
    assert names(Transformer(), **off)["excluded"] == ["table"]


def test_substrings_of_names_are_excluded_as_swin_lists_them():
    module = Transformer(set())
    module.no_weight_decay_keywords = lambda: {"abl"}
    assert names(module)["excluded"] == ["table"]


@pytest.mark.parametrize("attribute", [{"table"}, ["table"]], ids=["set", "list"])
def test_an_attribute_is_as_good_as_a_method(attribute):
    module = Transformer()
    module.no_weight_decay = attribute
    assert names(module)["excluded"] == ["table"]


@pytest.mark.parametrize("other", [lambda names: names, False], ids=["of arguments", "flag"])
def test_attributes_of_these_names_that_list_nothing_are_ignored(other):
    module = Transformer()
    module.no_weight_decay = other
    assert "excluded" not in names(module)


@pytest.mark.parametrize(
    ("mark", "is_excluded"), [(True, True), (False, False), ("yes", False), (None, False)]
)
def test_parameters_that_the_model_has_marked_are_excluded_as_in_mamba(mark, is_excluded):
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[0].weight._no_weight_decay = mark
    for wrapped in (module, torch.compile(module, backend="eager"), module.double()):
        groups = names(wrapped)
        assert groups.get("excluded", []) == (["0.weight"] if is_excluded else [])
    columns = {column.header: list(column.cells) for column in explain_param_groups(module).columns}
    assert columns["Rule"] == (["no_weight_decay", ""] if is_excluded else ["", ""])


def test_names_inside_a_compiled_part_are_found():
    class FromStateDict(Transformer):
        def no_weight_decay(self):
            return {name for name in self.state_dict() if "tokens" in name}

    module = FromStateDict()
    module.tokens = torch.compile(module.tokens, backend="eager")
    for wrapped in (module, torch.compile(module, backend="eager")):
        assert names(wrapped)["excluded"] == ["tokens.weight"]


class FromStateDict(nn.Module):
    """Looks for its names in its state dict, as timm's LeViT."""

    def __init__(self):
        super().__init__()
        self.biases = nn.Linear(3, 3)
        self.table = nn.Parameter(torch.zeros(3, 3))

    def no_weight_decay(self):
        return {name for name in self.state_dict() if "table" in name}

    def forward(self, batch):
        return self.biases(batch) @ self.table


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_a_submodule_that_reads_its_state_dict_does_not_become_an_fsdp_root(process_group):
    module = nn.Sequential(FromStateDict(), nn.Linear(3, 3))
    module[0].biases = FullyShardedDataParallel(
        module[0].biases, use_orig_params=True, device_id=torch.device("cpu")
    )
    whole = FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))
    assert names(whole) == {
        "adapted": ["0.biases.weight", "1.weight"],
        "excluded": ["0.table", "0.biases.bias", "1.bias"],
    }
    whole(torch.ones(2, 3)).sum().backward()
    assert "state_dict" not in vars(module[0])
