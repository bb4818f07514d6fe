"""Layer-wise learning-rate decay: the layers of models, and the rates of their groups."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lightning_lars import (
    LAMB,
    LARS,
    build_optimizer,
    explain_param_groups,
    param_groups,
)
from tests.support.vit import Block, ViT, mae_groups

DECAY = 0.75


def depths(module, **options):
    """The layer of every parameter by its name, read from the names of the groups."""
    groups = param_groups(module, layer_decay=0.5, **options)
    return {
        name: int(group["name"].split("layer_")[1].split(".")[0])
        for group in groups
        for name, _ in group["params"]
    }


def scales(module, layer_decay=0.5, **options):
    groups = param_groups(module, layer_decay=layer_decay, **options)
    return {p: group["lr_scale"] for group in groups for _, p in group["params"]}


def scheduled(optimizer, factor):
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * factor * group["lr_scale"]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, LAMB, LARS, partial(torch.optim.SGD, momentum=0.9)])
def test_training_equals_that_over_the_groups_of_mae_after_every_step(optimizer):
    torch.manual_seed(0)
    ours = ViT(layers=3).double()
    theirs = copy.deepcopy(ours)
    mine = build_optimizer(ours, optimizer, lr=0.01, weight_decay=0.05, layer_decay=DECAY)
    schedule = lr_scheduler.LambdaLR(mine, lambda step: 1 / (1 + step))
    source = optimizer(mae_groups(theirs, weight_decay=0.05, layer_decay=DECAY), lr=0.01)
    images, labels = torch.rand(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3])
    for step in range(4):
        scheduled(source, 1 / (1 + step))
        for model, stepped in ((ours, mine), (theirs, source)):
            stepped.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            stepped.step()
        schedule.step()
        for (name, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14, msg=f"{name} at step {step}")


def test_scales_are_those_of_mae():
    model = ViT(layers=4)
    groups = mae_groups(model, weight_decay=0.05, layer_decay=0.65)
    theirs = {p: group["lr_scale"] for group in groups for p in group["params"]}
    ours = {
        p: (group["lr_scale"], group["lr"])
        for group in param_groups(model, layer_decay=0.65, lr=2.0)
        for _, p in group["params"]
    }
    assert ours == {p: (scale, 2.0 * scale) for p, scale in theirs.items()}
    assert theirs[model.head.weight] == 1.0
    assert theirs[model.cls_token] == pytest.approx(0.65**5)


def test_the_layers_of_timm_are_the_same_up_to_the_final_norm():
    pytest.importorskip("torchvision", reason="timm needs it")
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    options = {"depth": 3, "embed_dim": 8, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **options)
    theirs = {
        p: group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.5)
        for p in group["params"]
    }
    ours = scales(model)
    different = [name for name, p in model.named_parameters() if ours[p] != theirs[p]]
    assert different == ["norm.weight", "norm.bias"]
    # timm takes a norm for a part of the block before it; as a mapping, its layers are taken as they are.
    mapping = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert scales(model, layer_depth=mapping) == theirs


def of(*modules, **named):
    """A module of these children, in this order."""
    net = nn.Module()
    for index, module in enumerate(modules):
        net.add_module(f"part{index}", module)
    for name, module in named.items():
        net.add_module(name, module)
    return net


class Bottleneck(nn.Module):
    def __init__(self, width, downsample=False):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)
        self.bn = nn.BatchNorm2d(width)
        if downsample:
            self.downsample = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))


def resnet():
    layers = [nn.Sequential(Bottleneck(width, True), *[Bottleneck(width)] * 1) for width in (2, 4, 8)]
    return of(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), *layers, nn.Linear(8, 3))


def held_stages(numbers=(2, 1, 3)):
    """As in Swin and ConvNeXt of timm: modules that hold a container of blocks and a downsampling layer."""
    stages = zip((2, 4, 8), numbers, strict=True)
    held = [of(nn.Linear(w, w), nn.ModuleList([Block(w) for _ in range(n)])) for w, n in stages]
    return of(nn.Conv2d(3, 2, 1), nn.ModuleList(held), nn.LayerNorm(8), nn.Linear(8, 3))


def features():
    """As in ConvNeXt and Swin of torchvision: stages and downsampling layers in one container."""
    down = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 4))
    inside = [nn.Sequential(nn.Conv2d(3, 2, 1), nn.LayerNorm(2)), nn.Sequential(Block(2), Block(2)), down]
    return of(nn.Sequential(*inside, nn.Sequential(Block(4))), nn.Linear(4, 3))


def experts():
    """Blocks that hold a container of experts are no stages: they are all of one width."""
    block = [of(nn.Linear(4, 4), nn.ModuleList([Block(4), Block(4)])) for _ in range(3)]
    return of(nn.Embedding(9, 4), nn.ModuleList(block), nn.Linear(4, 3))


def pairs(wrap=lambda module: module):
    """An attention and a feed-forward layer in a list, with or without a wrapper of one class."""
    block = [nn.ModuleList([wrap(nn.MultiheadAttention(4, 2)), wrap(of(nn.Linear(4, 4)))]) for _ in range(3)]
    return of(nn.Embedding(9, 4), nn.ModuleList(block), nn.Linear(4, 3))


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.fn = inner


class Hybrid(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)


def stages_of_one_block():
    """As in ResNet-10."""
    return of(nn.Conv2d(3, 2, 1), *[nn.Sequential(Bottleneck(width)) for width in (2, 4, 8)], nn.Linear(8, 3))


def mixed_stages():
    """As in BoTNet: the last stage has blocks of two classes."""
    stages = nn.Sequential(Bottleneck(2), Bottleneck(2)), nn.Sequential(Bottleneck(4), Hybrid())
    return of(nn.Conv2d(3, 2, 1), nn.Sequential(*stages), nn.Linear(4, 3))


def long_modules():
    """As in Xception: many blocks of several layers, the first of them wider."""
    held = [of(nn.Sequential(*[Block(w) for _ in range(3)])) for w in (2, *[4] * 9)]
    return of(nn.Conv2d(3, 2, 1), nn.Sequential(*held), nn.Linear(4, 3))


NETWORKS = {
    "stages of one block": (stages_of_one_block, 3),
    "a stage of two classes": (mixed_stages, 4),
    "blocks of several layers": (long_modules, 10),
    "ResNet": (resnet, 6),
    "stages that hold their blocks": (held_stages, 6),
    "stages beside downsampling layers": (features, 3),
    "experts": (experts, 3),
    "pairs": (pairs, 3),
    "pairs in wrappers": (lambda: pairs(Residual), 3),
    "two classes": (
        lambda: of(nn.Linear(2, 4), nn.ModuleList([Hybrid(), Hybrid(), Block(4), Block(4)]), nn.Linear(4, 3)),
        4,
    ),
    "plain layers": (
        lambda: of(nn.Linear(2, 4), nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), nn.Linear(4, 3)),
        3,
    ),
    "sequential": (lambda: nn.Sequential(nn.Linear(2, 4), Block(4), Block(4), nn.Linear(4, 3)), 2),
    "blocks in plain containers": (
        lambda: nn.Sequential(
            nn.Linear(2, 4),
            *[nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3)],
            nn.Linear(4, 2),
        ),
        3,
    ),
    "a small stack in the stem, heads and a teacher": (
        lambda: of(
            nn.Sequential(Bottleneck(1), Bottleneck(1)),
            nn.ModuleList([Block(8) for _ in range(4)]),
            nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)]),
            nn.ModuleList([Block(8) for _ in range(4)]).requires_grad_(False),
        ),
        4,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_counted_in_order_through_all_stages(name):
    build, blocks = NETWORKS[name]
    net = build()
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    found = depths(net)
    runs = list(dict.fromkeys(found[name] for name, _ in net.named_parameters() if name not in frozen))
    assert runs == list(range(blocks + 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_and_traced_models_have_the_same_layers():
    model = ViT(layers=3)
    assert depths(torch.jit.script(model)) == depths(model)
    assert depths(torch.jit.trace(model, torch.rand(2, 3, 8, 8))) == depths(model)


def test_a_downsampling_layer_belongs_to_the_block_after_it():
    found = depths(held_stages())
    assert found["part1.1.part0.weight"] == found["part1.1.part1.0.norm.weight"] == 3
    assert found["part1.0.part0.weight"] == 0
    assert depths(features())["part0.2.1.weight"] == 3


def test_tokens_come_before_the_blocks_and_a_temperature_after_them():
    model = ViT(layers=2)
    model.temperature = nn.Parameter(torch.ones(()))
    found = depths(model)
    assert (found["cls_token"], found["pos_embed"], found["temperature"]) == (0, 0, 3)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(2, 2),
        lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),
        lambda: nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)),
        lambda: of(nn.Linear(2, 4), nn.ModuleList([Block(4)]), nn.Linear(4, 3)),
        lambda: of(nn.Conv2d(1, 4, 1), nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])),
        lambda: of(
            nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Linear(4, 2)
        ),
        lambda: of(nn.Linear(4, 4), nn.ModuleList([block := Block(4), block]), nn.Linear(4, 2)),
    ],
    ids=["layer", "MLP", "CNN", "one block", "heads", "projector", "shared block"],
)
def test_a_model_without_a_stack_of_blocks_says_how_to_give_the_layers(build):
    with pytest.raises(ValueError, match=r"two or more of one class, got .* no depth for .*pass layer_depth"):
        param_groups(build(), layer_decay=DECAY)


def test_two_stacks_are_refused_because_their_order_is_unknown():
    encoder, decoder = (nn.ModuleList([Block(4), Block(4)]) for _ in range(2))
    net = of(encoder=of(layers=encoder), decoder=of(layers=decoder))
    with pytest.raises(ValueError, match=r"got encoder.layers \(2 blocks\) and decoder.layers \(2 blocks\)"):
        build_optimizer(net, LAMB, layer_decay=DECAY)
    found = depths(net, layer_depth=lambda name: int(name.split(".")[2]) + (2 if "decoder" in name else 0))
    assert sorted(set(found.values())) == [0, 1, 2, 3]
    scales = {group["lr_scale"] for group in param_groups(net, layer_decay=0.5, layer_depth={"*": 7})}
    assert scales == {1.0}


def test_given_layers_precede_those_by_order_and_the_first_pattern_wins():
    net = of(nn.Linear(4, 3), nn.ModuleList([Block(4), Block(4)]), nn.LayerNorm(4))
    assert depths(net)["part0.weight"] == 0
    found = depths(net, layer_depth={"part0.*": 3, "part0.bias": 0})
    assert (found["part0.weight"], found["part0.bias"], found["part1.0.norm.bias"]) == (3, 3, 1)
    found = depths(net, layer_depth=lambda name: 5 if name == "part0.weight" else None)
    assert (found["part0.weight"], found["part0.bias"], found["part2.weight"]) == (5, 0, 3)
    groups = param_groups(net, layer_decay=0.5, layer_depth={"net.part0.*": 3}, prefix="net")
    assert groups[-1]["name"] == "net.layer_3.excluded"
    assert ("net.part0.bias", net.part0.bias) in groups[-1]["params"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer_decay": 0}, ValueError, "layer_decay must be above 0 and at most 1, got 0"),
        ({"layer_decay": 1.5}, ValueError, "layer_decay must be above 0 and at most 1, got 1.5"),
        ({"layer_decay": True}, ValueError, "layer_decay must be above 0 and at most 1, got True"),
        ({"layer_decay": float("nan")}, ValueError, "layer_decay must be above 0"),
        ({"layer_depth": {"*": 1}}, ValueError, "layer_depth must be None without layer_decay"),
        ({"layer_decay": 0.5, "layer_depth": 3}, TypeError, "layer_depth must be a mapping"),
        (
            {"layer_decay": 0.5, "layer_depth": {"hea.*": 1}},
            ValueError,
            "got 'hea.*', which matches none: .*head",
        ),
        (
            {"layer_decay": 0.5, "layer_depth": {"head.*": -1}},
            ValueError,
            "at least 0, got -1 for 'head.weight'",
        ),
        ({"layer_decay": 0.5, "layer_depth": lambda name: "1"}, ValueError, "integers, .* got '1'"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    model = ViT(layers=2)
    for function in (param_groups, explain_param_groups, partial(build_optimizer, optimizer=LAMB)):
        with pytest.raises(error, match=message):
            function(model, **options)


def test_lr_is_for_layers_only():
    with pytest.raises(ValueError, match="lr must be None without layer_decay"):
        param_groups(nn.Linear(2, 2), lr=0.1)
    with pytest.raises(ValueError, match="lr must be at least 0 and finite, got -1"):
        param_groups(ViT(), layer_decay=DECAY, lr=-1)
    assert all("lr" not in group for group in param_groups(ViT(), layer_decay=DECAY))


def test_frozen_layers_keep_the_rates_of_the_others():
    model = ViT(layers=3)
    expected = {p: g["lr_scale"] for g in param_groups(model, layer_decay=DECAY) for _, p in g["params"]}
    model.blocks[:2].requires_grad_(False)
    groups = param_groups(model, layer_decay=DECAY)
    assert {name.split(".")[0] for name in (group["name"] for group in groups)} == {
        *("layer_0", "layer_3", "layer_4")
    }
    assert all(expected[p] == group["lr_scale"] for group in groups for _, p in group["params"])


def test_the_table_shows_layers_and_scales():
    table = explain_param_groups(ViT(layers=2), layer_decay=0.5)
    columns = {column.header: list(column.cells) for column in table.columns}
    rows = dict(zip(columns["Name"], zip(columns["Group"], columns["LR scale"], strict=True), strict=True))
    assert rows["cls_token"] == ("layer_0.excluded", "0.125")
    assert rows["blocks.1.norm.weight"] == ("layer_2.excluded", "0.5")
    assert rows["head.weight"] == ("layer_3.adapted", "1")
    assert "LR scale" not in [column.header for column in explain_param_groups(ViT()).columns]
