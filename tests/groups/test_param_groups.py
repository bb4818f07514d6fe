"""Which layers are excluded, on architectures with difficult cases."""

import re
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from lightning_lars import (
    DEFAULT_EXCLUDED,
    LAMB,
    LARS,
    build_optimizer,
    explain_param_groups,
    param_groups,
)


def names(module, **options):
    return {group["name"]: [name for name, _ in group["params"]] for group in param_groups(module, **options)}


class OwnRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class PreNormBlock(nn.Module):
    """A block around a normalization: its own parameter is no norm's."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.position = nn.Parameter(torch.zeros(2, 4))


class NormalizedLinear(nn.Linear):
    """Normalizes its weight, not its input."""


class WeightNormLinear(nn.Linear):
    """Reparametrizes its weight."""


class WindowAttention(nn.Module):
    """As in Swin: a table of biases to look up, and a bias of its own in the projection."""

    def __init__(self):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.q_bias = nn.Parameter(torch.zeros(4))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
        nn.LazyBatchNorm2d(),
        OwnRMSNorm(),
        type("LayerNorm2d", (OwnRMSNorm,), {})(),
        type("batch_norm", (OwnRMSNorm,), {})(),
        type("LayerNormalization", (OwnRMSNorm,), {})(),
        type("EvoNorm2dS0", (OwnRMSNorm,), {})(),
        type("AttentionNorm", (OwnRMSNorm,), {})(),
        type("MLPNorm", (OwnRMSNorm,), {})(),
        type("FilterResponse", (nn.BatchNorm2d,), {})(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_every_parameter_of_a_norm_is_excluded(norm):
    expected = [f"0.{name}" for name, _ in norm.named_parameters()]
    assert expected
    assert names(nn.Sequential(norm)) == {"excluded": expected}


@pytest.mark.parametrize(
    "module",
    [
        NormalizedLinear(4, 4),
        WeightNormLinear(4, 4),
        type("LinearNorm", (nn.Linear,), {})(4, 4),
        type("ConvNorm", (nn.Conv2d,), {})(4, 4, 3),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_layer_that_normalizes_its_weight_is_no_norm(module):
    assert names(module) == {"adapted": ["weight"], "excluded": ["bias"]}


class OneInputOneNorm(nn.Module):
    """A norm and a linear layer in one piece."""

    def __init__(self):
        super().__init__()
        self.layer_norm_weight = nn.Parameter(torch.ones(4))
        self.weight = nn.Parameter(torch.zeros(1, 4))


@pytest.mark.parametrize("called", ["LayerNormLinear", "LayerNormMLP", "RMSNormAttention", "NormHead"])
def test_a_norm_in_one_piece_with_a_layer_is_no_norm(called):
    groups = names(type(called, (OneInputOneNorm,), {})())
    assert groups == {"adapted": ["weight"], "excluded": ["layer_norm_weight"]}


def test_a_block_named_after_its_norm_keeps_its_own_parameters_adapted():
    assert names(PreNormBlock()) == {"adapted": ["position"], "excluded": ["norm.weight", "norm.bias"]}


def test_biases_of_recurrent_layers_are_excluded():
    groups = names(nn.Sequential(nn.GRU(3, 4, bidirectional=True), nn.LSTMCell(3, 4)))
    assert groups["adapted"] == [
        "0.weight_ih_l0",
        "0.weight_hh_l0",
        "0.weight_ih_l0_reverse",
        "0.weight_hh_l0_reverse",
        "1.weight_ih",
        "1.weight_hh",
    ]
    assert len(groups["excluded"]) == 6


def test_biases_of_attention_are_excluded():
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    assert names(attention) == {
        "adapted": ["in_proj_weight", "out_proj.weight"],
        "excluded": ["in_proj_bias", "bias_k", "bias_v", "out_proj.bias"],
    }


def test_a_table_of_biases_is_adapted_and_a_query_bias_is_not():
    assert names(WindowAttention()) == {"adapted": ["relative_position_bias_table"], "excluded": ["q_bias"]}


def test_a_convolution_whose_name_contains_bn_is_adapted():
    module = nn.ModuleDict({"bnk": nn.Conv2d(1, 2, 3), "embed_bn": nn.Linear(2, 2, bias=False)})
    assert names(module) == {"adapted": ["bnk.weight", "embed_bn.weight"], "excluded": ["bnk.bias"]}


def test_a_tied_weight_is_listed_once_under_its_first_name():
    module = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    module["head"].weight = module["embedding"].weight
    assert names(module) == {"adapted": ["embedding.weight"], "excluded": ["head.bias"]}


def test_a_tied_weight_is_excluded_under_any_of_its_names():
    module = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    module["head"].weight = module["embedding"].weight
    groups = names(module, exclude=("head.weight",))
    assert groups == {"excluded": ["embedding.weight", "head.bias"]}


def test_a_module_used_twice_is_listed_once():
    layer = nn.Linear(2, 2)
    assert names(nn.Sequential(layer, layer)) == {"adapted": ["0.weight"], "excluded": ["0.bias"]}


def test_a_module_used_twice_is_excluded_under_any_of_its_names():
    layer = nn.Linear(2, 2)
    assert names(nn.Sequential(layer, layer), exclude="1.*") == {"excluded": ["0.weight", "0.bias"]}


def test_frozen_parameters_are_skipped():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    assert names(module) == {"adapted": ["1.weight"], "excluded": ["1.bias"]}


def test_a_parametrized_layer_counts_as_its_original_type():
    module = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(2, 2)),
        parametrizations.weight_norm(nn.LayerNorm(2), "bias"),
        parametrizations.spectral_norm(nn.Linear(2, 2), "weight"),
    )
    assert names(module) == {
        "adapted": [
            "0.parametrizations.weight.original1",
            "2.parametrizations.weight.original",
        ],
        "excluded": [
            "0.bias",
            "0.parametrizations.weight.original0",
            "1.weight",
            "1.parametrizations.bias.original0",
            "1.parametrizations.bias.original1",
            "2.bias",
        ],
    }


def test_a_parametrized_bias_is_a_bias():
    class Positive(nn.Module):
        def forward(self, x):
            return x.abs()

    module = nn.Linear(2, 2)
    nn.utils.parametrize.register_parametrization(module, "bias", Positive())
    assert names(module) == {"adapted": ["weight"], "excluded": ["parametrizations.bias.original"]}


def test_lazy_parameters_are_grouped_before_they_have_a_shape_and_train_afterwards():
    module = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    groups = names(module)
    assert groups == {"adapted": ["0.weight"], "excluded": ["0.bias", "1.weight", "1.bias"]}
    optimizer = build_optimizer(module, LARS, lr=1.0)
    module(torch.randn(4, 5)).pow(2).sum().backward()
    before = module[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(module[0].weight, before)


def test_a_prefix_stands_before_names_and_groups():
    module = nn.Sequential(nn.Linear(2, 2))
    for prefix in ("body", "body."):
        assert names(module, prefix=prefix) == {
            "body.adapted": ["body.0.weight"],
            "body.excluded": ["body.0.bias"],
        }
    for pattern in ("0.weight", "body.0.weight"):
        expected = {"body.excluded": ["body.0.weight", "body.0.bias"]}
        assert names(module, prefix="body", exclude=pattern) == expected
    rows = explain_param_groups(module, prefix="body").columns
    assert [list(rows[column].cells) for column in (0, 3)] == [
        ["body.0.weight", "body.0.bias"],
        ["body.adapted", "body.excluded"],
    ]
    with pytest.raises(TypeError, match="prefix must be a string, got 3"):
        param_groups(module, prefix=3)


def test_a_separate_rate_goes_to_the_excluded_group_under_any_prefix():
    optimizer = build_optimizer(nn.Linear(2, 2), LARS, lr=1.0, excluded_lr=0.1, prefix="body")
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        ("body.adapted", 1.0),
        ("body.excluded", 0.1),
    ]


def test_prefixes_of_wrappers_are_no_part_of_a_name():
    class FSDPLike(nn.Module):
        def __init__(self, module):
            super().__init__()
            self._fsdp_wrapped_module = module

    module = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"), FSDPLike(nn.LayerNorm(2)))
    assert names(module) == {"adapted": ["0.weight"], "excluded": ["0.bias", "1.weight", "1.bias"]}


def test_the_module_of_ddp_is_no_part_of_a_name(process_group):
    module = nn.Sequential(nn.Linear(2, 2))
    module.module = nn.LayerNorm(2)
    wrapped_twice = torch.compile(DistributedDataParallel(module), backend="eager")
    for wrapped in (DistributedDataParallel(module), wrapped_twice):
        groups = names(wrapped, exclude=[*DEFAULT_EXCLUDED, "0.*"])
        assert groups == {"excluded": ["0.weight", "0.bias", "module.weight", "module.bias"]}
    inside = nn.ModuleDict({"net": DistributedDataParallel(nn.Linear(2, 2))})
    assert names(inside) == {"adapted": ["net.weight"], "excluded": ["net.bias"]}


def test_every_trainable_parameter_is_in_exactly_one_group():
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)
    grouped = [parameter for group in param_groups(module) for _, parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(module.parameters())


def test_the_excluded_group_is_neither_adapted_nor_decayed():
    groups = param_groups(nn.Linear(2, 2))
    assert [{k: v for k, v in group.items() if k != "params"} for group in groups] == [
        {"name": "adapted"},
        {"name": "excluded", "layer_adaptation": False, "weight_decay": 0.0},
    ]


class OfEachKind(nn.Module):
    """A norm, a bias, a gain and a weight."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))
        self.linear = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


@pytest.mark.parametrize(
    ("switches", "adapted"),
    [
        ({}, []),
        ({"exclude_bias": False}, ["linear.bias"]),
        ({"exclude_norm": False}, ["norm.weight"]),
        ({"exclude_gain": False}, ["gain"]),
        ({"exclude_norm": False, "exclude_bias": False}, ["linear.bias", "norm.weight", "norm.bias"]),
        (dict.fromkeys(["exclude_norm", "exclude_bias", "exclude_gain"], False),
         ["gain", "linear.bias", "norm.weight", "norm.bias"]),
    ],
    ids=["none", "bias", "norm", "gain", "norm and bias", "all"],
)  # fmt: skip
def test_each_default_can_be_switched_off(switches, adapted):
    expected = [name for name, _ in OfEachKind().named_parameters() if name in ["linear.weight", *adapted]]
    groups = names(OfEachKind(), **switches)
    assert groups["adapted"] == expected
    assert of_optimizer(build_optimizer(OfEachKind(), LARS, **switches)) == groups


@pytest.mark.parametrize(
    "exclude",
    [
        nn.Embedding,
        (nn.Embedding,),
        "embedding.*",
        ["embedding.weight"],
        (*DEFAULT_EXCLUDED, "embedding.*"),
        lambda name, parameter, owner: isinstance(owner, nn.Embedding) and parameter.ndim == 2,
    ],
    ids=["type", "types", "pattern", "patterns", "with the defaults", "predicate"],
)
def test_exclude_adds_to_the_defaults(exclude):
    module = nn.ModuleDict(
        {"embedding": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 2)}
    )
    for grouped in (
        names(module, exclude=exclude),
        of_optimizer(build_optimizer(module, LARS, exclude=exclude)),
    ):
        assert grouped == {
            "adapted": ["head.weight"],
            "excluded": ["embedding.weight", "norm.weight", "norm.bias", "head.bias"],
        }


def of_optimizer(optimizer):
    return {group["name"]: group["param_names"] for group in optimizer.param_groups}


def test_a_pattern_that_matches_nothing_raises_and_names_the_closest():
    with pytest.raises(ValueError, match=r"got 'norm'.*closest names are \['norm.bias', 'norm.weight'\]"):
        param_groups(nn.ModuleDict({"norm": nn.LayerNorm(4)}), exclude="norm")


@pytest.mark.parametrize(
    "exclude", [[3], 3, None, nn.Linear(2, 2), torch.Tensor, {"weight": True}, b"weight"]
)
def test_an_exclusion_of_another_kind_raises(exclude):
    with pytest.raises(TypeError, match=r"exclude must hold module types, patterns .* got "):
        param_groups(nn.Linear(2, 2), exclude=exclude)


@pytest.mark.parametrize(
    "door", [param_groups, explain_param_groups, partial(build_optimizer, optimizer=LARS)]
)
@pytest.mark.parametrize("switch", ["exclude_norm", "exclude_bias", "exclude_gain"])
@pytest.mark.parametrize("value", ["no", 0, None, ("weight",)])
def test_a_switch_that_is_no_bool_raises(door, switch, value):
    with pytest.raises(ValueError, match=rf"{switch} must be True or False, got {re.escape(repr(value))}"):
        door(nn.Linear(2, 2), **{switch: value})


def test_parameters_instead_of_a_module_raise():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got .*: pass the model itself"):
        param_groups(nn.Linear(2, 2).parameters())


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)])
def test_a_module_without_trainable_parameters_raises(module):
    with pytest.raises(ValueError, match="module must have at least one parameter with requires_grad=True"):
        param_groups(module)


def test_the_table_names_every_parameter_with_the_rule_that_decided():
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), OwnRMSNorm(), nn.LazyLinear(2, bias=False), nn.PReLU()
    )
    module[0].weight.requires_grad_(False)
    table = explain_param_groups(module, exclude=(*DEFAULT_EXCLUDED, "3.*"))
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("0.weight", "(2, 1, 3, 3)", "Conv2d", "frozen", "requires_grad=False"),
        ("0.bias", "(2,)", "Conv2d", "excluded", "bias"),
        ("1.weight", "(2,)", "BatchNorm2d", "excluded", "NormBase"),
        ("1.bias", "(2,)", "BatchNorm2d", "excluded", "NormBase"),
        ("2.scale", "(4,)", "OwnRMSNorm", "excluded", "named_norm"),
        ("3.weight", "lazy", "LazyLinear", "excluded", "'3.*'"),
        ("4.weight", "(1,)", "PReLU", "excluded", "gain"),
    ]
    console = Console(record=True, width=100)
    console.print(table)
    assert "OwnRMSNorm" in console.export_text()


@pytest.mark.parametrize("optimizer", [LARS, LAMB, torch.optim.SGD, torch.optim.AdamW])
def test_build_optimizer_takes_any_optimizer_class(optimizer):
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    built = build_optimizer(module, optimizer, lr=0.5, weight_decay=0.1)
    assert type(built) is optimizer
    adapted, excluded = built.param_groups
    assert (adapted["param_names"], adapted["lr"], adapted["weight_decay"]) == (["0.weight"], 0.5, 0.1)
    assert (excluded["param_names"][0], excluded["lr"], excluded["weight_decay"]) == ("0.bias", 0.5, 0.0)


def test_build_optimizer_takes_a_callable():
    built = build_optimizer(nn.Linear(2, 2), lambda groups: LARS(groups, lr=0.5))
    assert [group["layer_adaptation"] for group in built.param_groups] == [True, False]


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_excluded_lr_scale_multiplies_the_rate_of_the_excluded_group_alone(lr):
    built = build_optimizer(nn.Linear(2, 2), LARS, lr=lr, excluded_lr_scale=0.5)
    assert [float(group["lr"]) for group in built.param_groups] == [0.5, 0.25]
    assert float(lr) == 0.5


@pytest.mark.parametrize("optimizer", [LARS, torch.optim.SGD])
def test_a_tensor_lr_is_neither_shared_between_groups_nor_with_the_caller(optimizer):
    lr = torch.tensor(0.5)
    adapted, excluded = build_optimizer(nn.Linear(2, 2), optimizer, lr=lr).param_groups
    assert len({id(lr), id(adapted["lr"]), id(excluded["lr"])}) == 3


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), None, "a", True])
def test_an_excluded_lr_scale_out_of_range_raises(scale):
    with pytest.raises(ValueError, match=f"excluded_lr_scale must be above 0 and finite, got {scale!r}"):
        build_optimizer(nn.Linear(2, 2), LARS, excluded_lr_scale=scale)


def test_an_excluded_lr_scale_without_effect_raises():
    with pytest.raises(ValueError, match=r"excluded_lr_scale must be 1.0 where no parameter is excluded"):
        build_optimizer(nn.Linear(2, 2, bias=False), LARS, excluded_lr_scale=0.5)


@pytest.mark.parametrize("optimizer", ["LARS", None, 3])
def test_an_optimizer_that_cannot_be_called_raises(optimizer):
    with pytest.raises(TypeError, match="optimizer must be an optimizer class or a callable"):
        build_optimizer(nn.Linear(2, 2), optimizer)


def test_a_callable_that_returns_no_optimizer_raises():
    with pytest.raises(TypeError, match=r"optimizer must return a torch\.optim\.Optimizer, got 7"):
        build_optimizer(nn.Linear(2, 2), lambda groups: 7)


def test_brackets_in_names_and_patterns_are_text_in_the_explanation():
    net = nn.ModuleDict({"[/red]": nn.Linear(2, 2), "[b]old": nn.Linear(2, 2)})
    console = Console(width=120)
    with console.capture() as captured:
        console.print(explain_param_groups(net, exclude="[[]b]*.[vw]*"))
    for cell in ("[/red].weight", "[b]old.weight", "'[[]b]*.[vw]*'"):
        assert f" {cell} " in captured.get()
