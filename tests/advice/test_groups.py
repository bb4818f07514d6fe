"""What is unusual in parameter groups, and the memory of their state."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit, build_optimizer
from lightning_lars.advice.groups import overview, peak_rates, unusual
from lightning_lars.advice.state_memory import expected_bytes, held_bytes

ZEROS = "weights are all 0"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.hidden = nn.Linear(8, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 8)

    def forward(self, tokens):
        return self.head(self.norm(self.hidden(self.embed(tokens))))


def sentences(net, *optimizers, steps=100):
    return unusual(net, optimizers, peak_rates(optimizers, {}), steps)


def build(optimizer, net=None, **options):
    net = Net() if net is None else net
    net.embed.requires_grad_(False)
    return sentences(net, build_optimizer(net, optimizer, **options))


def zeroed():
    net = Net()
    nn.init.zeros_(net.head.weight)
    return net


@pytest.mark.parametrize("optimizer", [LARS, LAMB], ids=["LARS", "LAMB"])
def test_nothing_is_unusual_in_the_groups_of_the_package(optimizer):
    options = {"lr": 3.0, "excluded_lr": 0.05} if optimizer is LARS else {"lr": 0.01}
    net = Net()
    net.embed.requires_grad_(False)
    net.hidden = nn.Linear(64, 64)
    assert sentences(net, build_optimizer(net, optimizer, **options)) == ()


@pytest.mark.parametrize(
    ("told", "options"),
    [
        (["a learning rate of 3. That is plain SGD", "excluded_lr=0.05"], {"optimizer": LARS, "lr": 3.0}),
        (["a learning rate of 0.1. That is plain Adam"], {"optimizer": LAMB, "lr": 0.1}),
        (["1 layer of weights that are all 0 (head.weight)"], {"optimizer": LAMB, "net": zeroed()}),
        (["LARS adapts no layer: without layer adaptation it is plain SGD"],
         {"optimizer": LARS, "exclude": "*"}),
        (["are excluded from layer adaptation", "['hidden.weight'"],
         {"optimizer": LAMB, "exclude": "hidden.weight"}),
        (["trust_coefficient * lr is 0.0001 at its peak"], {"optimizer": LARS, "lr": 0.1}),
        (["adapted, 4 of them (hidden.bias, norm.weight, norm.bias, ...)", "nothing is excluded"],
         {"optimizer": LARS, "exclude_norm": False, "exclude_bias": False, "exclude_gain": False}),
        (["norms, biases and gains are adapted, 1 of them (head.bias)"],
         {"optimizer": lambda groups: LAMB([
             {"params": [*groups[0]["params"], groups[1]["params"][-1]]},
             {"params": groups[1]["params"][:-1], "layer_adaptation": False, "weight_decay": 0.0}])}),
    ],
    ids=["rate", "Adam's", "zeros", "none adapted", "share", "SGD's", "none excluded", "one adapted"],
)  # fmt: skip
def test_says_what_is_unusual(told, options):
    found = build(**options)
    for text in told:
        assert any(text in sentence for sentence in found), found


def test_biases_that_begin_at_zero_are_no_zero_layers():
    assert not any(ZEROS in each for each in build(LARS, exclude_bias=False))
    net = Net()
    nn.init.zeros_(net.hidden.bias)
    assert not any(ZEROS in each for each in build(LARS, net, exclude_bias=False))


def test_says_where_embedding_tables_are_adapted():
    net = Net()
    assert any(
        "adapts embedding tables (embed.weight)" in each
        for each in sentences(net, build_optimizer(net, LAMB))
    )
    excluded = build_optimizer(net, LAMB, exclude=(nn.Embedding,))
    assert not any("embedding tables" in each for each in sentences(net, excluded))


def test_says_which_parameters_no_optimizer_trains():
    net = Net()
    [sentence, *_] = sentences(net, torch.optim.SGD(net.hidden.parameters(), lr=0.1))
    assert sentence.startswith(
        "5 parameters with requires_grad=True in no optimizer (embed.weight, norm.weight"
    )
    assert "requires_grad_(False)" in sentence


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (
            partial(torch.optim.AdamW, lr=0.001),
            "AdamW decays 4 norms, biases and gains (hidden.bias, norm",
        ),
        (partial(torch.optim.Adam, lr=0.1), "Adam has a learning rate of 0.1, and rarely trains above 0.05"),
        (partial(torch.optim.SGD, lr=2.0), "SGD has a learning rate of 2, and rarely trains above 1"),
        (partial(torch.optim.Rprop, lr=2.0), None),
        (partial(torch.optim.Adam, lr=0.01), None),
    ],
)
def test_looks_at_other_optimizers_too(optimizer, told):
    net = Net()
    found = sentences(net, optimizer(net.parameters()))
    assert len(found) == (told is not None)
    assert all(told in sentence for sentence in found)


def test_the_overview_counts_every_parameter_once_with_its_peak_rate():
    net = Net()
    net.norm.requires_grad_(False)
    optimizer = build_optimizer(net.hidden, LARS, lr=2.0, weight_decay=0.1, excluded_lr=0.5)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[6.0, 0.25], total_steps=9)
    rates = peak_rates([optimizer], {optimizer: [scheduler]})
    groups = {group.name: group for group in overview(net, [optimizer], rates)}
    assert [(each.name, each.tensors, each.elements, each.lr) for each in groups.values()] == [
        ("adapted", 1, 8 * 64, 6.0),
        ("excluded", 1, 64, 0.25),
        ("(in no optimizer)", 3, 64 + 64 * 8 + 8, None),
        ("(frozen)", 2, 128, None),
    ]
    assert groups["adapted"].layer_adaptation is True
    assert groups["excluded"].layer_adaptation is False
    assert groups["adapted"].weight_decay == pytest.approx(0.1)
    sgd = build_optimizer(net, torch.optim.SGD, lr=0.1)
    plain = overview(net, [sgd], peak_rates([sgd], {}))
    assert {group.layer_adaptation for group in plain} == {None}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_says_that_biases_are_decayed_only_where_they_are(weight_decay):
    net = nn.Linear(3, 2)
    [sentence] = sentences(net, LARS(net.parameters(), lr=1.0, weight_decay=weight_decay))
    assert ("multiplicative, and decayed:" in sentence) == (weight_decay > 0)
    assert "multiplicative" in sentence
    weights, biases = (
        {"params": [net.weight], "weight_decay": 0.1},
        {"params": [net.bias], "weight_decay": 0.0},
    )
    [sentence] = sentences(net, LARS([weights, biases], lr=1.0))
    assert "decayed" not in sentence


@pytest.mark.parametrize("optimizer", [LARS, LAMB, LARS8bit, LAMB8bit], ids=lambda each: each.__name__)
def test_expected_memory_is_what_the_state_takes(optimizer):
    if "8bit" in optimizer.__name__:
        pytest.importorskip("torchao", exc_type=ImportError)
    shapes = [(64, 64), (4096,), (65, 64), (100, 50), (7,), ()]
    dtypes = (torch.float32, torch.float64, torch.float16)
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes for dtype in dtypes]
    built = optimizer(params)
    assert held_bytes(built.state.values()) == 0
    for p in params:
        p.grad = torch.ones_like(p)
    built.step()
    assert held_bytes(built.state.values()) == expected_bytes(params)[optimizer.__name__]


def test_state_in_single_precision_is_expected_for_half_precision_parameters():
    params = [nn.Parameter(torch.ones(10, dtype=torch.bfloat16))]
    built = LARS(params)
    params[0].grad = torch.ones_like(params[0])
    built.step()
    assert held_bytes(built.state.values()) == expected_bytes(params)["LARS"] == 40
