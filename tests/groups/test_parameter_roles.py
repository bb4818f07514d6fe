"""Norms, biases, gains, tokens and weights as they occur in published models."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

from lightning_lars import explain_param_groups, param_groups


def names(module, **options):
    return {group["name"]: [name for name, _ in group["params"]] for group in param_groups(module, **options)}


def holding(called="Block", bases=(nn.Module,), arguments=(), **shapes):
    """A module of that name whose own parameters have these shapes."""
    module = type(called, bases, {})(*arguments)
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.ones(shape)))
    return module


def own_parameters_are(group, module):
    own = [name for name, _ in module.named_parameters()]
    assert names(module) == {group: own}
    assert own


@pytest.mark.parametrize(
    "module",
    [
        holding("LayerScale", gamma=(4,)),
        holding("ConvNeXtBlock", gamma=(4, 1, 1)),
        holding("ReZero", alpha=()),
        holding("Gate", gate=(1,)),
        holding("CLIP", logit_scale=(), logit_bias=()),
        holding("WindowAttention", logit_scale=(3, 1, 1)),
        holding("XCA", temperature=(4, 1, 1)),
        holding("MultiheadAttention", head_scale=(4, 1)),
        nn.PReLU(),
        nn.PReLU(4),
        holding("LearnableQuantizer", step_size=(1,), zero_point=()),
        holding("Affine", alpha=(1, 1, 4), beta=(1, 1, 4)),
        holding("FRN", gamma=(1, 4, 1, 1), beta=(1, 4, 1, 1), tau=(1, 4, 1, 1)),
        holding("TLU", tau=(4,)),
        holding("DynamicTanh", alpha=(1,), gamma=(4,), beta=(4,)),
        holding("ConvNextV2GRN", weight=(1, 1, 1, 4), bias=(1, 1, 1, 4)),
        holding("GlobalResponseNorm", weight=(4,), bias=(4,)),
        holding("Snake", alpha=(1, 4, 1)),
        holding("StarReLU", scale=(1,), bias=(1,)),
        holding("ViT", cls_token=(1, 1, 4), pos_embed=(1, 5, 4), reg_token=(1, 2, 4)),
        holding("ViTEmbeddings", position_embeddings=(1, 5, 4), mask_token=(1, 1, 4)),
        holding("Synthesis", const=(1, 4, 3, 3)),
        holding("AttentionPoolLatent", latent=(1, 1, 4)),
        holding("ClassEmbedding", class_embedding=(4,)),
        holding("Branches", alpha=(4, 8), gamma_1=(2, 8), layer_scale=(2, 8)),
        holding("AdaptiveNormBlock", scale_shift_table=(6, 8)),
        holding("AdaptiveNormBlock", scale_shift_table=(1, 6, 8)),
        holding("RadioPatchEmbeddings", cls_register_token=(5, 8), mask_tokens=(3, 1, 1, 8)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_gains_and_tokens_are_excluded(module):
    own_parameters_are("excluded", module)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(1, 4, bias=False),
        nn.Linear(4, 1, bias=False),
        nn.Linear(1, 1, bias=False),
        nn.Conv2d(1, 1, 1, bias=False),
        nn.Conv1d(1, 1, 3, bias=False),
        nn.ConvTranspose2d(1, 4, 1, bias=False),
        nn.Embedding(1, 4),
        nn.Embedding(4, 1),
        nn.EmbeddingBag(1, 4),
        nn.Bilinear(1, 1, 1, bias=False),
        nn.RNN(1, 1, bias=False),
        nn.LSTM(1, 1, bias=False, proj_size=0),
        nn.GRUCell(1, 1, bias=False),
        nn.MultiheadAttention(1, 1, bias=False),
        nn.MultiheadAttention(1, 1, bias=False, kdim=2, vdim=3),
        holding("SamePadding", (nn.Conv2d,), (1, 1, 3, 1, 0, 1, 1, False)),
        holding("Conv1D", weight=(1, 4)),
        holding("TiedHead", weight=(4, 1)),
        holding("PackedAttention", in_proj_weight=(12, 4)),
        holding("RankOne", (nn.Linear,), (4, 4, False), lora_a=(1, 4), lora_b=(4, 1)),
        holding("WindowAttention", relative_position_bias_table=(9, 1)),
        holding("Attention", relative_attention_bias=(9, 2), rel_pos_bias=(9, 2)),
        holding("SegmentPositionEmbedding", bias=(9, 2)),
        holding("Embeddings", token_embedding=(5, 4), scale_proj=(4, 4)),
        holding("CLIP", positional_embedding=(5, 4), text_projection=(4, 4)),
        holding("Perceiver", latents=(5, 4)),
        holding("Experts", gate_up_proj=(2, 4, 4)),
        nn.Linear(4, 1, bias=False, device="meta"),
    ],
    ids=lambda module: type(module).__name__,
)
def test_weights_are_adapted_whatever_their_shape(module):
    own_parameters_are("adapted", module)


@pytest.mark.parametrize(
    ("module", "excluded"),
    [
        (holding("ScaledStdConv2d", (nn.Conv2d,), (1, 4, 3), gain=(4, 1, 1, 1)), ["bias", "gain"]),
        (holding("QuantLinear", (nn.Linear,), (4, 4), alpha=(), step=(4,)), ["bias", "alpha", "step"]),
        (holding("MagnitudeLinear", (nn.Linear,), (4, 4), magnitude=(4,)), ["bias", "magnitude"]),
        (holding("RowLinear", (nn.Linear,), (4, 4), magnitude=(4, 1)), ["bias", "magnitude"]),
        (
            holding("LSQLinear", (nn.Linear,), (4, 4), w_scale=(4, 1), step_size=(4, 1), zero_point=(4, 1)),
            ["bias", "w_scale", "step_size", "zero_point"],
        ),
        (holding("GroupWiseLinear", (nn.Linear,), (4, 4), scales=(4, 2)), ["bias", "scales"]),
        (holding("GatedConv", (nn.Conv1d,), (4, 4, 1), gamma_1=(1, 4)), ["bias", "gamma_1"]),
    ],
    ids=["gain", "quantizer", "magnitude", "magnitudes of rows", "scales of rows", "groups", "gate"],
)
def test_a_weight_scale_in_a_subclass_of_a_layer_is_a_gain(module, excluded):
    assert names(module) == {"adapted": ["weight"], "excluded": excluded}


@pytest.mark.parametrize(
    "bias",
    ["pos_bias_u", "pos_bias_v", "gate_up_proj_bias", "position_bias", "bias_k", "bias_v", "r_w_bias",
     "q_bias", "dt_bias", "bias", "bias_ih_l0_reverse", "in_proj_bias", "e_score_correction_bias"],
)  # fmt: skip
def test_biases_under_other_names_are_excluded_as_such(bias):
    module = holding("Attention", **{bias: (2, 4)})
    own_parameters_are("excluded", module)
    (column,) = [column for column in explain_param_groups(module).columns if column.header == "Rule"]
    assert list(column.cells) == ["bias"]
    assert names(module, exclude_bias=False) == {"adapted": [bias]}


@pytest.mark.parametrize(
    "table",
    [
        "relative_position_bias_table",
        "bias_table",
        "bias_embedding",
        "bias_weight",
        "unbiased",
        "debias_layer",
    ],
)
def test_lookup_tables_and_generators_of_biases_are_not_biases(table):
    own_parameters_are("adapted", holding("Attention", **{table: (9, 4)}))


def test_a_relative_bias_that_is_added_directly_is_a_bias():
    own_parameters_are("excluded", holding("Attention", rel_pos_bias=(2, 5, 5)))


@pytest.mark.parametrize("called", ["relative_position_bias_table", "rel_pos_table"])
def test_a_table_is_no_gain_with_a_single_head(called):
    own_parameters_are("adapted", holding("Attention", **{called: (9, 1)}))


class ActivatedNorm(nn.Module):
    """As ABN: neither inherits nor is called a norm, but keeps running statistics."""

    def __init__(self, width=4):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))


def test_a_module_that_keeps_running_statistics_is_a_norm():
    module = nn.Sequential(ActivatedNorm(), nn.Linear(4, 4, bias=False))
    assert names(module) == {"adapted": ["1.weight"], "excluded": ["0.weight"]}
    assert names(module, exclude_norm=False) == {"adapted": ["0.weight", "1.weight"]}


@pytest.mark.parametrize("called", ["FusedConvBN", "LinearWithStatistics"])
def test_a_layer_that_keeps_running_statistics_is_no_norm(called):
    own_parameters_are("adapted", type(called, (ActivatedNorm,), {})())


def test_a_block_around_a_layer_with_running_statistics_is_not_a_norm():
    module = ActivatedNorm()
    module.linear = nn.Linear(4, 4, bias=False)
    own_parameters_are("adapted", module)


def test_a_gain_is_known_where_it_is_parametrized():
    module = holding(gamma=(4,))
    parametrize.register_parametrization(module, "gamma", nn.Softplus())
    assert names(module) == {"excluded": ["parametrizations.gamma.original"]}


def test_a_norm_is_known_where_it_is_parametrized():
    module = holding("OwnNorm", scale=(4, 4))
    parametrize.register_parametrization(module, "scale", nn.Softplus())
    assert names(module) == {"excluded": ["parametrizations.scale.original"]}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("split", [weight_norm, parametrizations.weight_norm])
@pytest.mark.parametrize(
    ("layer", "attribute", "dim"),
    [
        (nn.Linear(4, 3, bias=False), "weight", 0),
        (nn.Linear(1, 3, bias=False), "weight", 0),
        (nn.Linear(4, 1, bias=False), "weight", None),
        (nn.Conv1d(4, 4, 3, bias=False), "weight", 2),
        (nn.Embedding(5, 4), "weight", 1),
        (nn.LSTM(4, 2, bias=False), "weight_hh_l0", 0),
        (nn.MultiheadAttention(4, 2, bias=False), "in_proj_weight", 0),
        (holding("Projection", kernel=(4, 4)), "kernel", 0),
    ],
)
def test_the_lengths_of_weight_normalization_are_gains_and_the_directions_are_weights(
    split, layer, attribute, dim
):
    layer = split(copy.deepcopy(layer), attribute, dim)
    lengths = {f"{attribute}_g", f"parametrizations.{attribute}.original0"}
    groups = {name: group for group, listed in names(layer).items() for name in listed}
    assert {name for name, group in groups.items() if group == "excluded"} == lengths & set(groups)
    assert len(lengths & set(groups)) == 1


def test_the_contents_of_a_list_belong_to_the_module_with_the_list():
    norm, gated, layer = holding("StackedNorm"), holding("Gated"), holding("PackedLinear")
    norm.scales = nn.ParameterList([torch.ones(4, 4)])
    gated.gates = nn.ParameterDict({"a": torch.ones(4), "b": torch.ones(4, 4)})
    layer.weights = nn.ParameterList([torch.ones(1, 4), torch.ones(4, 1)])
    assert names(nn.ModuleList([norm, gated, layer])) == {
        "adapted": ["1.gates.b", "2.weights.0", "2.weights.1"],
        "excluded": ["0.scales.0", "1.gates.a"],
    }


def test_a_weight_is_adapted_though_a_module_of_another_kind_has_it_too():
    module = holding("Model")
    module.head = nn.Linear(4, 1, bias=False)
    module.direction = module.head.weight
    assert names(module) == {"adapted": ["direction"]}


def test_a_gain_that_two_modules_share_is_excluded_once():
    first, second = holding(gamma=(4,)), holding()
    second.gamma = first.gamma
    assert names(nn.ModuleList([first, second])) == {"excluded": ["0.gamma"]}


def test_a_switch_leaves_what_two_rules_could_exclude_to_its_own():
    """A bias that is a vector is no gain where biases stay adapted, nor is the scale of a norm."""
    module = nn.Sequential(
        nn.Linear(4, 4), nn.LayerNorm(4), holding("Attention", q_bias=(4,)), holding(gamma=(4,))
    )
    assert names(module, exclude_norm=False, exclude_bias=False)["excluded"] == ["3.gamma"]


def test_the_shape_of_a_lazy_parameter_must_be_known_where_it_decides():
    module = holding("Gated")
    module.gate = nn.UninitializedParameter()
    message = r"the shape of 'gate' must be known, .*: call this after a first forward.*exclude_gain=False"
    with pytest.raises(ValueError, match=message):
        param_groups(module)
    assert names(module, exclude_gain=False) == {"adapted": ["gate"]}
    assert names(module, exclude="gate") == {"excluded": ["gate"]}
    module.head = nn.Linear(2, 2)
    module.gate = nn.UninitializedParameter(requires_grad=False)
    assert names(module) == {"adapted": ["head.weight"], "excluded": ["head.bias"]}


def test_shapes_before_the_parts_of_deepspeed_are_believed():
    """ZeRO stage 3 leaves an empty tensor, and the shape beside it."""
    module = holding(gamma=(0,), matrix=(0,))
    module.gamma.ds_shape, module.matrix.ds_shape = torch.Size([4]), torch.Size([4, 4])
    assert names(module) == {"adapted": ["matrix"], "excluded": ["gamma"]}


def test_a_parameter_without_elements_may_stand_anywhere():
    """As those that only tell the device of a module."""
    assert names(nn.Sequential(holding("Model", dummy=(0,)), nn.Linear(2, 2)))["adapted"] == ["1.weight"]
