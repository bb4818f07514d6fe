"""State dicts are matched by names where both sides have them: other orders, wrappers, other groups."""

import copy
import itertools

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB, LARS
from tests.support.layers import give_gradients

both = pytest.mark.parametrize("optimizer_class", [LARS, LAMB])

NAMES = ("a.weight", "b.weight", "c.weight", "d.bias")
RATES = {"adapted": 0.3, "excluded": 0.1}


def moved(groups, optimizer_class=LARS, named=True, rename=lambda name: name, steps=2, **options):
    """An optimizer of layers that all have one shape, after some steps: the state tells the name.

    Args:
        groups: Lists of names, each a group; or dicts with more options.
    """
    groups = [{"params": group} if isinstance(group, list) else group for group in groups]
    layers = {
        name: Parameter(torch.full((2, 2), 1.0 + NAMES.index(name)))
        for group in groups
        for name in group["params"]
    }
    pairs = [
        {
            **group,
            "params": [(rename(name), layers[name]) if named else layers[name] for name in group["params"]],
        }
        for group in groups
    ]
    optimizer = optimizer_class(pairs, **{"lr": 0.5, **options})
    for step in range(steps):
        for name, p in layers.items():
            p.grad = torch.full((2, 2), 1.0 + 10 * NAMES.index(name) + step)
        optimizer.step()
    return optimizer, layers


def state_of(optimizer, layers):
    """The state by the plain name of its layer."""
    return {
        name: {key: value.clone() for key, value in optimizer.state[p].items()} for name, p in layers.items()
    }


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


def assert_loads(saved, expected, fresh, layers, names):
    fresh.load_state_dict(copy.deepcopy(saved))
    assert_same(state_of(fresh, layers), expected)
    assert [group["param_names"] for group in fresh.param_groups] == names
    # The next ratios are told under the optimizer's own names.
    give_gradients(layers.values(), 5)
    fresh.step()
    assert list(fresh.trust_ratios()) == list(itertools.chain(*names))


@both
@pytest.mark.parametrize("order", list(itertools.permutations(NAMES[:3])))
def test_layers_in_another_order_get_their_own_state(optimizer_class, order):
    source, layers = moved([list(order)], optimizer_class)
    fresh, own = moved([list(NAMES[:3])], optimizer_class, steps=0)
    assert_loads(source.state_dict(), state_of(source, layers), fresh, own, [list(NAMES[:3])])


WRAPPERS = {
    "ddp": lambda name: f"module.{name}",
    "compile": lambda name: f"_orig_mod.{name}",
    "a compiled layer": lambda name: name.replace(".", "._orig_mod."),
    "ddp of compile": lambda name: f"module._orig_mod.{name}",
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}",
    "fsdp of fsdp": lambda name: "_fsdp_wrapped_module." + name.replace(".", "._fsdp_wrapped_module."),
    "activation checkpointing": lambda name: name.replace(".", "._checkpoint_wrapped_module."),
    "fabric": lambda name: f"_forward_module.{name}",
    "fabric with ddp": lambda name: f"_forward_module.module.{name}",
    "an attribute of a LightningModule": lambda name: f"model.{name}",
    "two attributes": lambda name: f"learner.backbone.{name}",
    "an attribute, wrapped": lambda name: f"module.model.{name}",
}


@pytest.mark.parametrize("rename", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("wrapped", ["saved", "own"])
def test_names_match_with_and_without_a_prefix(rename, wrapped):
    def plain(name):
        return name

    saved, own = (rename, plain) if wrapped == "saved" else (plain, rename)
    source, layers = moved([["b.weight", "a.weight"]], rename=saved)
    fresh, own_layers = moved([["a.weight", "b.weight"]], rename=own, steps=0)
    names = [[own("a.weight"), own("b.weight")]]
    assert_loads(source.state_dict(), state_of(source, layers), fresh, own_layers, names)


def test_submodules_named_like_wrappers_are_distinguished():
    def with_module(name):
        return {"a.weight": "module.weight", "b.weight": "weight"}[name]

    source, layers = moved([["b.weight", "a.weight"]], rename=with_module)
    fresh, own = moved([["a.weight", "b.weight"]], rename=with_module, steps=0)
    assert_loads(source.state_dict(), state_of(source, layers), fresh, own, [["module.weight", "weight"]])


GROUPS = {
    "groups in another order": (
        [["d.bias"], ["a.weight", "b.weight"]],
        [["a.weight", "b.weight"], ["d.bias"]],
    ),
    "one group divided": ([["a.weight", "b.weight", "d.bias"]], [["b.weight"], ["d.bias", "a.weight"]]),
    "groups united": ([["a.weight"], ["d.bias", "b.weight"]], [["b.weight", "a.weight", "d.bias"]]),
    "divided otherwise": ([["a.weight", "b.weight"], ["d.bias"]], [["a.weight"], ["b.weight", "d.bias"]]),
}


@both
@pytest.mark.parametrize(("saved", "own"), GROUPS.values(), ids=GROUPS)
def test_groups_with_equal_hyperparameters_may_be_split_differently(optimizer_class, saved, own):
    source, layers = moved(saved, optimizer_class, lr=0.7, weight_decay=0.2)
    fresh, own_layers = moved(own, optimizer_class, steps=0)
    assert_loads(source.state_dict(), state_of(source, layers), fresh, own_layers, own)
    assert {(group["lr"], group["weight_decay"]) for group in fresh.param_groups} == {(0.7, 0.2)}


ADAPTED = {"name": "adapted", "params": ["a.weight", "b.weight"], "lr": 0.3}
EXCLUDED = {"name": "excluded", "params": ["d.bias"], "lr": 0.1, "layer_adaptation": False}


@both
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_hyperparameters_follow_the_names(optimizer_class, tensor_lr):
    saved = [EXCLUDED, ADAPTED]
    if tensor_lr:
        saved = [{**group, "lr": torch.tensor(group["lr"])} for group in saved]
    source, layers = moved(saved, optimizer_class, weight_decay=0.3)
    fresh, own = moved([{**ADAPTED, "lr": 1.0}, {**EXCLUDED, "lr": 1.0}], optimizer_class, steps=0)
    fresh.load_state_dict(source.state_dict())
    assert [group["name"] for group in fresh.param_groups] == ["adapted", "excluded"]
    assert [float(group["lr"]) for group in fresh.param_groups] == pytest.approx([0.3, 0.1])
    assert [group["layer_adaptation"] for group in fresh.param_groups] == [True, False]
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.3, 0.3]
    assert_same(state_of(fresh, own), state_of(source, layers))


REFUSED = {
    "divided by what differs": (
        [[*NAMES]],
        [ADAPTED | {"params": ["a.weight", "b.weight", "c.weight"]}, EXCLUDED],
        r"with \[3, 1\] parameters, got groups of \[4\]: .* among .*\[0, 1\] .*'lr', 'layer_adaptation'",
    ),
    "united though it differs": (
        [ADAPTED, EXCLUDED],
        [["a.weight", "b.weight", "d.bias"]],
        r"with \[3\] parameters, got groups of \[2, 1\]: .* merges .*\[0, 1\] .*'lr', 'layer_adaptation'",
    ),
    "other layers": (
        [["a.weight", "b.weight"]],
        [["a.weight", "c.weight"]],
        r"names of the optimizer's parameters, but it does not have 'c.weight', and has 'b.weight', which",
    ),
    "a layer more": (
        [["a.weight", "b.weight"]],
        [["a.weight"]],
        r"with \[1\] parameters, got groups of \[2\]: it has 'b.weight', which the optimizer does not have",
    ),
    "a layer less": (
        [["a.weight"]],
        [["a.weight", "b.weight"]],
        r"with \[2\] parameters, got groups of \[1\]: it does not have 'b.weight'",
    ),
}


@both
@pytest.mark.parametrize(("saved", "own", "match"), REFUSED.values(), ids=REFUSED)
def test_ambiguous_matches_are_refused_and_change_nothing(optimizer_class, saved, own, match):
    source, _ = moved(saved, optimizer_class)
    fresh, layers = moved(own, optimizer_class, steps=1)
    scheduler = torch.optim.lr_scheduler.StepLR(fresh, 1)
    state_dict = copy.deepcopy(source.state_dict())
    kept, before = copy.deepcopy(state_dict), copy.deepcopy((fresh.state_dict(), scheduler.state_dict()))
    groups, ratios = fresh.param_groups, fresh.trust_ratios()
    with pytest.raises(ValueError, match=match):
        fresh.load_state_dict(state_dict)
    assert fresh.param_groups is groups
    assert_same(state_dict["state"], kept["state"])
    assert state_dict["param_groups"] == kept["param_groups"]
    assert_same(fresh.state_dict()["state"], before[0]["state"])
    assert (fresh.state_dict()["param_groups"], scheduler.state_dict()) == (
        before[0]["param_groups"],
        before[1],
    )
    assert_same(fresh.trust_ratios(), ratios)
    assert layers


def test_a_deleted_key_keeps_the_optimizers_hyperparameter():
    """The way out that the refusal of divided groups offers."""
    source, layers = moved([[*NAMES]], lr=0.7, weight_decay=0.2)
    own = [ADAPTED | {"params": ["a.weight", "b.weight", "c.weight"]}, EXCLUDED]
    fresh, own_layers = moved(own, steps=0)
    state_dict = source.state_dict()
    for key in ("lr", "layer_adaptation"):
        del state_dict["param_groups"][0][key]
    fresh.load_state_dict(state_dict)
    assert [group["lr"] for group in fresh.param_groups] == [0.3, 0.1]
    assert [group["layer_adaptation"] for group in fresh.param_groups] == [True, False]
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.2, 0.2]
    assert_same(state_of(fresh, own_layers), state_of(source, layers))


@both
@pytest.mark.parametrize(("saved_named", "own_named"), [(True, False), (False, True), (False, False)])
def test_without_names_on_one_side_the_position_counts(optimizer_class, saved_named, own_named):
    source, layers = moved([["b.weight", "a.weight"]], optimizer_class, saved_named)
    fresh, own = moved([["a.weight", "b.weight"]], optimizer_class, own_named, steps=0)
    fresh.load_state_dict(source.state_dict())
    saved, loaded = state_of(source, layers), state_of(fresh, own)
    assert_same(loaded, {"a.weight": saved["b.weight"], "b.weight": saved["a.weight"]})
    assert fresh.param_groups[0].get("param_names") == (["a.weight", "b.weight"] if own_named else None)


def test_a_number_is_not_a_name():
    """It stands for a name where a group was added without any, as BackboneFinetuning adds it."""
    source, layers = moved(
        [["a.weight", "b.weight"], ["c.weight"]], rename=lambda n: {"c.weight": "2"}.get(n, n)
    )
    fresh, own = moved([["a.weight", "b.weight"], ["c.weight"]], steps=0)
    assert_loads(
        source.state_dict(), state_of(source, layers), fresh, own, [["a.weight", "b.weight"], ["c.weight"]]
    )


def test_names_in_place_of_numbers_take_precedence_over_param_names():
    """torch.distributed.checkpoint puts them in the optimizer's order, and leaves the others as they were."""
    source, layers = moved([["b.weight", "a.weight"]])
    saved = source.state_dict()
    state = {name: saved["state"][i] for i, name in enumerate(["b.weight", "a.weight"])}
    group = {**saved["param_groups"][0], "params": ["a.weight", "b.weight"]}
    assert group["param_names"] == ["b.weight", "a.weight"]
    fresh, own = moved([["a.weight", "b.weight"]], steps=0)
    fresh.load_state_dict({"state": state, "param_groups": [group]})
    assert_same(state_of(fresh, own), state_of(source, layers))


def test_warns_of_a_scheduler_that_would_mix_up_the_groups():
    source, _ = moved([EXCLUDED, ADAPTED])
    fresh, _ = moved([ADAPTED, EXCLUDED], steps=0)
    torch.optim.lr_scheduler.StepLR(fresh, 1)
    with pytest.warns(UserWarning, match="a scheduler stores learning rates by position") as caught:
        fresh.load_state_dict(source.state_dict())
    assert caught[0].filename == __file__
