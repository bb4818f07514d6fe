"""Groups that change without add_param_group: fine-tuning, pruning, growing, groups that take turns."""

import copy
import gc
import math
import re
import weakref

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit
from tests.support.eight_bit import needs_torchao
from tests.support.releases import has

both = pytest.mark.parametrize("optimizer_class", [LARS, LAMB])


def layer(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))


def give_gradient(p, step):
    generator = torch.Generator().manual_seed(100 * step + p.numel())
    p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)


def replace(optimizer, new):
    """Growing: other layers in the place of the first two."""
    optimizer.param_groups[0]["params"][:2] = [new(5, 9), new(9)]


def drop(optimizer, new):
    """Pruning whole layers."""
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][:1]


def append(optimizer, new):
    optimizer.param_groups[0]["params"] += [new(3), new()]


def assign_groups(optimizer, new):
    """As BackboneFinetuning does on a resume."""
    added = {**optimizer.param_groups[0], "params": [new(4), new(2, 3)]}
    added.pop("param_names", None)
    optimizer.param_groups = [*optimizer.param_groups, added]


def assign_a_group_without_options(optimizer, new):
    optimizer.param_groups.append({"params": [new(2, 3)]})


def only_vectors(optimizer, new):
    """Layers that were given are left: the new ones are no parts of them."""
    optimizer.param_groups[0]["params"] = [*optimizer.param_groups[0]["params"][:1], new(8), new(9)]


def another_matrix(optimizer, new):
    """Of the same shape, in the place of all layers."""
    for group in optimizer.param_groups:
        group["params"] = [new(*p.shape) for p in group["params"]]


def empty(optimizer, new):
    optimizer.param_groups[1]["params"].clear()


CHANGES = [
    replace,
    drop,
    append,
    assign_groups,
    assign_a_group_without_options,
    only_vectors,
    another_matrix,
    empty,
]
NOT_IN_TORCH = {"assign_a_group_without_options"}  # KeyError


def build(optimizer_class, named, **options):
    """Two matrices and vectors, a scalar among them, in two groups."""
    params = [("a", layer(5, 7)), ("b", layer(7)), ("c", layer(2, 2)), ("d", layer())]
    if not named:
        params = [p for _, p in params]
    return optimizer_class([{"params": params[:3]}, {"params": params[3:]}], lr=0.1, **options)


def walk(optimizer, change):
    """Two steps, the change, and two more; return the layers of each of the last steps."""
    seeds = iter(range(10, 30))
    for step in range(4):
        if step == 2:
            change(optimizer, lambda *shape: layer(*shape, seed=next(seeds)))
        for group in optimizer.param_groups:
            for p in group["params"]:
                give_gradient(p, step)
        optimizer.step()
        if step >= 2:
            yield [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("change", [change for change in CHANGES if change.__name__ not in NOT_IN_TORCH])
@pytest.mark.parametrize("named", [True, False])
def test_layers_that_are_not_adapted_continue_as_in_torch(change, named):
    options = {"momentum": 0.9, "dampening": 0.3}
    sgd = build(torch.optim.SGD, named, **options)
    lars = build(LARS, named, **options)
    lars.defaults["layer_adaptation"] = False
    for group in lars.param_groups:
        group["layer_adaptation"] = False
    for expected, actual in zip(walk(sgd, change), walk(lars, change), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("named", [True, False])
@both
def test_remaining_layers_continue_and_new_ones_start(optimizer_class, change, named):
    """Each layer as an optimizer of its own would move it, from where the layer comes."""

    class Each:
        """An optimizer a layer."""

        def __init__(self, groups, **options):
            self.param_groups = [{"params": [p for _, p in group["params"]]} for group in groups]
            self.options, self.optimizers = options, {}

        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    if p not in self.optimizers:
                        self.optimizers[p] = optimizer_class([p], **self.options)
                    self.optimizers[p].step()

    each = build(Each, True, weight_decay=0.1)
    optimizer = build(optimizer_class, named, weight_decay=0.1)
    for expected, actual in zip(walk(each, change), walk(optimizer, change), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("steps_first", [True, False])
@both
def test_a_checkpoint_contains_the_current_groups_and_loads(optimizer_class, change, steps_first):
    optimizer = build(optimizer_class, named=False)
    walks = walk(optimizer, change)
    next(walks)
    if not steps_first:
        optimizer.param_groups[0]["params"][0] = layer(6, 6)
    saved = copy.deepcopy(optimizer.state_dict())
    numbers = {number for group in saved["param_groups"] for number in group["params"]}
    assert saved["state"].keys() <= numbers
    assert len(saved["state"]) == len(numbers) - (not steps_first)
    optimizer.load_state_dict(saved)
    assert len(optimizer.state) == len(saved["state"])


@both
def test_removed_parameters_are_freed_with_their_state(optimizer_class):
    optimizer = build(optimizer_class, named=False)
    gone = weakref.ref(optimizer.param_groups[0]["params"][0])
    walks = walk(optimizer, replace)
    next(walks)
    momentum = len(optimizer.state)
    assert momentum == sum(len(group["params"]) for group in optimizer.param_groups)
    next(walks)
    gc.collect()
    assert gone() is None


@both
def test_groups_may_take_turns(optimizer_class):
    """As in torch.optim, what is left out for a while goes on from its state."""
    turns, straight = (build(optimizer_class, named=False, weight_decay=0.1) for _ in range(2))
    groups = turns.param_groups
    for step in range(3):
        for index in range(2):
            turns.param_groups = groups[index : index + 1]
            for p in groups[index]["params"]:
                give_gradient(p, step)
            turns.step()
            assert turns.state.keys() == set(groups[index]["params"])
        turns.param_groups = groups
        for group in straight.param_groups:
            for p in group["params"]:
                give_gradient(p, step)
        straight.step()
    for own, expected in zip(groups, straight.param_groups, strict=True):
        torch.testing.assert_close(own["params"], expected["params"], rtol=0.0, atol=0.0)


@pytest.mark.slow
@pytest.mark.skipif(not has("torch>=2.7"), reason="torch 2.6 cannot compile a step")
def test_a_compiled_step_follows_the_groups():
    torch.compiler.reset()
    runs = []
    for backend in (None, "eager"):
        optimizer = build(LAMB, named=False, fused=False)
        optimizer.step = (
            torch.compile(optimizer.step, fullgraph=True, backend=backend) if backend else optimizer.step
        )
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.1)
        runs.append(list(walk(optimizer, another_matrix)))
    torch.testing.assert_close(runs[1], runs[0], rtol=0.0, atol=0.0)


@both
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (
            lambda p: torch.zeros(2, dtype=torch.complex64, requires_grad=True),
            "real floating-point .*complex64",
        ),
        (lambda p: p * 2, "must be leaf tensors"),
        (lambda p: p, "every parameter once"),
    ],
    ids=["complex", "a result", "twice"],
)
def test_invalid_parameters_in_changed_groups_are_refused(optimizer_class, bad, match):
    optimizer = build(optimizer_class, named=False)
    (first, *_), before = (
        optimizer.param_groups[0]["params"],
        optimizer.param_groups[0]["params"][0].detach().clone(),
    )
    give_gradient(first, 0)
    optimizer.param_groups[0]["params"].append(bad(first))
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert torch.equal(first, before)
    assert not optimizer.state


@both
def test_flat_tensors_in_place_of_all_layers_are_refused(optimizer_class):
    """A shard for each layer, as others than DeepSpeed flatten."""
    optimizer = build(optimizer_class, named=False)
    for group in optimizer.param_groups:
        group["params"] = [Parameter(p.detach().reshape(-1)) for p in group["params"]]
        for p in group["params"]:
            give_gradient(p, 0)
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    with pytest.raises(RuntimeError, match=r"is not a layer that .*flat tensors \(4\) .*its 4 layers"):
        optimizer.step()
    assert all(
        torch.equal(p, old)
        for p, old in zip(
            (p for group in optimizer.param_groups for p in group["params"]), before, strict=True
        )
    )


@both
def test_vectors_may_replace_matrices_as_new_layers(optimizer_class):
    optimizer = optimizer_class([layer(3, 4), layer(4)], lr=0.1)
    optimizer.param_groups.clear()
    vector = layer(12)
    optimizer.add_param_group({"params": [vector]})
    give_gradient(vector, 0)
    optimizer.step()
    assert optimizer.state.keys() == {vector}


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB, LARS8bit, LAMB8bit])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("shape", [(9, 9), (2, 3), (3, 4, 1), (12,)], ids=str)
@pytest.mark.parametrize("stale", ["state", "gradient"])
def test_state_and_gradients_of_a_previous_shape_are_refused(optimizer_class, fused, shape, stale):
    """Layers grown or pruned by ``p.data = ...``: kernels would read and write past the end."""
    if optimizer_class in (LARS8bit, LAMB8bit):
        needs_torchao()
    first, second = Parameter(torch.ones(2, 2)), Parameter(torch.ones(3, 4))
    optimizer = optimizer_class([("first", first), ("second", second)], lr=0.1, fused=fused)
    first.grad, second.grad = torch.ones(2, 2), torch.ones(3, 4)
    optimizer.step()
    second.data = torch.ones(shape)
    if stale == "state":
        second.grad = torch.ones(shape)
    else:
        optimizer.state.pop(second)
    before = first.detach().clone(), copy.deepcopy(optimizer.state[first])
    match = rf"'second' must have the parameter's shape, {re.escape(str(shape))}, got \(3, 4\)"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert torch.equal(first, before[0])
    assert second.eq(1).all()
    assert all(torch.equal(optimizer.state[first][key], value) for key, value in before[1].items())
    optimizer.state.pop(second, None)
    second.grad = torch.ones(shape)
    optimizer.step()
    assert second.lt(1).all()


@pytest.mark.parametrize("steps_first", [0, 3])  # without and with a plan to repeat
@pytest.mark.parametrize(
    ("optimizer_class", "name", "value", "message"),
    [
        (LARS, "lr", "x", "lr must be at least 0 and finite, got 'x'"),
        (LARS, "lr", None, "lr must be at least 0 and finite, got None"),
        (LARS, "lr", math.nan, "lr must be at least 0 and finite, got nan"),
        (LAMB, "lr", -0.1, "lr must be at least 0 and finite, got -0.1"),
        (LAMB, "lr", [0.1], "lr must be at least 0 and finite, got [0.1]"),
        (LAMB, "lr", torch.tensor([0.1, 0.2]), "lr must be a number or a tensor of one element"),
        (LARS, "weight_decay", torch.ones(2), "weight_decay must be at least 0 and finite, got tensor"),
        (LARS, "momentum", "x", "momentum must be in [0, 1), got 'x'"),
        (LAMB, "betas", 0.9, "betas must be two numbers in [0, 1), got 0.9"),
        (LARS, "max_grad_norm", 0.5, "max_grad_norm must be the same in every group (None)"),
        (LAMB8bit, "min_8bit_size", "x", "min_8bit_size must be"),
    ],
)
def test_a_hyperparameter_made_invalid_by_hand_raises_before_any_layer_moves(
    optimizer_class, name, value, message, steps_first
):
    params = [Parameter(torch.ones(3, 4)), Parameter(torch.ones(3, 4))]
    optimizer = optimizer_class([{"params": [p]} for p in params], lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(steps_first):
        optimizer.step()
    before = [p.detach().clone() for p in params]
    valid = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    optimizer.param_groups[1][name] = valid
    optimizer.step()
    assert not torch.equal(params[0], before[0])


def test_a_schedule_to_zero_that_ends_below_it_by_rounding_steps_and_resumes():
    p = Parameter(torch.ones(3))
    optimizer = LARS([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, 0.0, 10)
    for _ in range(10):
        p.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
    assert -1e-16 < optimizer.param_groups[0]["lr"] < 0
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    optimizer.load_state_dict(saved)
    optimizer.step()


@both
def test_a_group_that_is_replaced_after_some_steps_gets_the_defaults_of_what_it_lacks(optimizer_class):
    p, other = layer(3, 4), layer(3, 4)
    optimizer = optimizer_class([p], lr=0.1, weight_decay=0.5)
    expected = optimizer_class([other], lr=0.2, weight_decay=0.5)
    for step in range(5):
        for each in (p, other):
            give_gradient(each, step)
        if step == 0:
            optimizer.param_groups[0]["lr"] = 0.2
        if step == 3:
            optimizer.param_groups[0] = {"params": [p], "lr": 0.2}
        optimizer.step()
        expected.step()
        assert torch.equal(p, other)


def test_state_without_its_number_of_steps_is_refused_before_any_layer_moves():
    params = [layer(3, 4), layer(5)]
    optimizer = LAMB(params)
    for p in params:
        give_gradient(p, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    del optimizer.state[params[1]]["step"]
    with pytest.raises(RuntimeError, match="parameter '1' must hold 'step' beside"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    optimizer.state.pop(params[1])
    optimizer.step()
