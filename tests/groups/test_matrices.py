"""Which parameters are the matrices of hidden layers, and an optimizer of their own for them."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, AdamW

from lightning_lars import LAMB, LARS, CombinedOptimizer, build_optimizer, explain_param_groups, param_groups
from tests.support.muon import MUON, needs_muon
from tests.support.vit import ViT

HIDDEN = {"blocks.0.linear.weight", "blocks.1.linear.weight"}
BY_SGD = partial(SGD, lr=0.1)


def matrices_of(module, matrices=True, **options):
    groups = param_groups(module, matrices=matrices, **options)
    return {name for group in groups if group["name"].endswith("matrices") for name, _ in group["params"]}


class Decoder(nn.Module):
    """A language model as in the textbook, with its head tied to the embedding or not."""

    def __init__(self, is_tied=False):
        super().__init__()
        self.lm_head = nn.Linear(8, 11, bias=False)  # before the blocks
        self.tokens = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.project = nn.Linear(8, 8)
        if is_tied:
            self.lm_head.weight = self.tokens.weight


IN_DECODER = {
    f"encoder.layers.{number}.{weight}"
    for number in (0, 1)
    for weight in (
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    )
}


class Conv1D(nn.Module):
    """The linear layer of GPT-2 in transformers, by its name."""

    def __init__(self, rows, columns):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 2))


class Own(nn.Module):
    """A class that says nothing of what its parameter does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))


def mlp(*between):
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5), *between, nn.Linear(5, 3))


def resnet_with_projector():
    blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2)))
    projector = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
    return nn.ModuleDict({"backbone": blocks, "projector": projector})


def stacked(*layers):
    """Blocks between an input and an output layer."""
    blocks = [nn.ModuleDict({"layer": layer, "norm": nn.LayerNorm(4)}) for layer in layers]
    return nn.ModuleDict({"first": nn.Linear(4, 4), "blocks": nn.ModuleList(blocks), "last": nn.Linear(4, 4)})


CASES = {
    "a vision transformer": (ViT, HIDDEN),
    "a head before the blocks": (Decoder, IN_DECODER),
    "a tied head": (partial(Decoder, is_tied=True), IN_DECODER),
    "an MLP without blocks": (mlp, {"0.weight", "2.weight"}),
    "an MLP of equal layers": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)),
        {"0.weight", "1.weight"},
    ),
    "convolutions in the blocks": (resnet_with_projector, {"projector.0.weight"}),
    "a layer by its class name": (
        lambda: stacked(Conv1D(4, 4), Conv1D(4, 4)),
        {f"blocks.{number}.layer.weight" for number in (0, 1)},
    ),
    "weight normalization": (
        lambda: stacked(*(parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(2))),
        {f"blocks.{number}.layer.parametrizations.weight.original1" for number in (0, 1)},
    ),
    "a recurrent layer, an embedding, an unknown one and a vector": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.Embedding(4, 4), Own(), nn.Linear(4, 1)),
        set(),
    ),
}


@pytest.mark.parametrize(("build", "hidden"), CASES.values(), ids=CASES)
def test_matrices_are_those_of_the_linear_layers_in_the_blocks(build, hidden):
    module = build()
    assert matrices_of(module) == hidden
    assert matrices_of(torch.compile(module)) == hidden
    everywhere = [name for group in param_groups(module, matrices=True) for name, _ in group["params"]]
    assert sorted(everywhere) == sorted(name for name, _ in module.named_parameters())


def test_linear_layers_without_any_blocks_leave_out_the_last_one_alone():
    module = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 3))
    assert matrices_of(module) == {"0.weight"}


def test_frozen_and_excluded_weights_are_no_matrices():
    module = ViT()
    module.blocks[0].linear.weight.requires_grad_(False)
    assert matrices_of(module) == {"blocks.1.linear.weight"}
    groups = param_groups(ViT(), matrices=True, exclude="blocks.1.*")
    assert [(group["name"], len(group["params"])) for group in groups][-1] == ("matrices", 1)


@pytest.mark.parametrize(
    ("matrices", "hidden"),
    [
        ({"head.*": True}, {*HIDDEN, "head.weight"}),
        ({"blocks.1.*": False}, {"blocks.0.linear.weight"}),
        ({"blocks.1.linear.weight": True, "blocks.*": False}, {"blocks.1.linear.weight"}),
        (lambda name: True if name == "head.weight" else None, {*HIDDEN, "head.weight"}),
        (lambda name: name == "head.weight", {"head.weight"}),
        (False, set()),
    ],
)
def test_patterns_and_functions_take_precedence_for_what_is_adapted(matrices, hidden):
    assert matrices_of(ViT(), matrices) == hidden


def test_names_may_have_the_prefix_and_wrappers_do_not_count():
    for pattern in ("head.*", "net.head.*"):
        assert matrices_of(ViT(), {pattern: True}, prefix="net") == {
            f"net.{name}" for name in {*HIDDEN, "head.weight"}
        }
    table = explain_param_groups(ViT(), matrices={"head.*": True}, prefix="net")
    names, _, _, groups, rules = ([*column.cells] for column in table.columns)
    rows = {name: (group, rule) for name, group, rule in zip(names, groups, rules, strict=True)}
    assert rows["net.blocks.0.linear.weight"] == ("net.matrices", "hidden matrix")
    assert rows["net.head.weight"] == ("net.matrices", "'head.*'")
    assert rows["net.head.bias"] == ("net.excluded", "bias")


@pytest.mark.parametrize(
    ("matrices", "error", "said"),
    [
        (
            {"hed.*": True},
            ValueError,
            "match the whole name of an adapted parameter, got 'hed.*', which matches",
        ),
        ({"head.bias": True}, ValueError, "got 'head.bias', which matches none: the closest names are"),
        ({"head.*": 1}, TypeError, "matrices must be a mapping from patterns over parameter names to True"),
        ("head.*", TypeError, r"matrices must be a mapping .* got 'head.\*'"),
        (
            lambda name: "yes",
            TypeError,
            "must return True, False or None, got 'yes' for 'patch_embed.weight'",
        ),
    ],
)
def test_rules_that_match_nothing_or_say_nothing_are_refused(matrices, error, said):
    with pytest.raises(error, match=said):
        param_groups(ViT(), matrices=matrices)
    if matrices != "head.*":
        with pytest.raises(error, match=said):
            build_optimizer(ViT(), LAMB, matrix_optimizer=BY_SGD, matrices=matrices)


def test_a_rule_for_a_parameter_that_another_rule_excludes_is_refused():
    with pytest.raises(ValueError, match=r"got 'head.weight', which matches none"):
        build_optimizer(
            ViT(), LAMB, matrix_optimizer=BY_SGD, matrices={"head.weight": True}, exclude=["head.*"]
        )


@pytest.mark.parametrize(
    ("optimizer", "matrix_optimizer"),
    [(partial(LAMB, lr=0.01), BY_SGD), (partial(AdamW, lr=0.01), partial(LARS, lr=0.5))],
)
def test_the_optimizer_for_matrices_has_its_own_rate_beside_those_of_the_others(optimizer, matrix_optimizer):
    module = ViT()
    built = build_optimizer(module, optimizer, matrix_optimizer=matrix_optimizer, excluded_lr=0.002)
    assert isinstance(built, CombinedOptimizer)
    lr = matrix_optimizer.keywords["lr"]
    assert [(group["name"], group["lr"]) for group in built.param_groups] == [
        ("adapted", 0.01),
        ("excluded", 0.002),
        ("matrices", lr),
    ]
    assert set(built.param_groups[2]["param_names"]) == HIDDEN
    built = build_optimizer(
        module, optimizer, matrix_optimizer=matrix_optimizer, layer_decay=0.5, excluded_lr_scale=0.1
    )
    rates = {group["name"]: group["lr"] for group in built.param_groups}
    assert rates["layer_1.matrices"] == lr * 0.25
    assert rates["layer_2.matrices"] == lr * 0.5
    assert rates["layer_1.excluded"] == pytest.approx(0.01 * 0.1 * 0.25)
    assert rates["layer_3.adapted"] == 0.01
    assert [group["name"] for group in built.optimizers[1].param_groups] == [
        "layer_1.matrices",
        "layer_2.matrices",
    ]


@needs_muon
def test_muon_trains_the_hidden_matrices_and_refuses_convolutions():
    module = ViT()
    muon = partial(MUON, lr=0.02)
    optimizer = build_optimizer(module, LAMB, lr=0.01, matrix_optimizer=muon)
    assert set(optimizer.optimizers[1].param_groups[0]["param_names"]) == HIDDEN
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        build_optimizer(module, LAMB, matrix_optimizer=muon, matrices={"patch_embed.*": True})


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"matrices": {"head.*": True}}, ValueError, "matrices must be None without matrix_optimizer"),
        ({"matrix_optimizer": 3}, TypeError, "matrix_optimizer must be an optimizer class or a callable"),
        (
            {"matrix_optimizer": SGD([torch.ones(2)], lr=1.0)},
            TypeError,
            "matrix_optimizer must be an optimizer class or a callable",
        ),
        (
            {"matrix_optimizer": lambda groups: None},
            TypeError,
            "matrix_optimizer must return a torch.optim.Optimizer, got None",
        ),
        (
            {"matrix_optimizer": BY_SGD, "matrices": {"blocks.*": False}},
            ValueError,
            r"matrix_optimizer must be None where there is no matrix, .* ViT has no trained weight",
        ),
    ],
)
def test_wrong_use_says_what_to_do(options, error, said):
    with pytest.raises(error, match=said):
        build_optimizer(ViT(), LAMB, **options)


def test_nothing_but_matrices_is_refused():
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with pytest.raises(ValueError, match=r"optimizer must have parameters to step, .* nothing but matrices"):
        build_optimizer(module, LAMB, matrix_optimizer=BY_SGD, matrices=lambda name: True)


def test_a_lazy_layer_is_refused_until_its_shape_is_known():
    module = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(
        ValueError, match=r"the shape of '0.weight' must be known, because it decides whether .* matrix"
    ):
        param_groups(module, matrices=True)
    module(torch.ones(2, 3))
    assert matrices_of(module) == {"0.weight"}
