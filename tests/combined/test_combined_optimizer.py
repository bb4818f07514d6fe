"""Several optimizers as one: equal to those stepped by hand, and all or nothing where one of them refuses."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, lr_scheduler

from lightning_lars import LAMB, LARS, CombinedOptimizer, LAMB8bit
from tests.support.muon import MUON, needs_muon

MOMENTUM = partial(SGD, lr=0.1, momentum=0.9)
PAIRS = {
    "LAMB and Muon": (partial(LAMB, lr=0.01), lambda p: MUON(p, lr=0.02)),
    "AdamW and Muon": (partial(AdamW, lr=0.01), lambda p: MUON(p, lr=0.02)),
    "AdamW and LARS": (partial(AdamW, lr=0.01), partial(LARS, lr=0.5, max_grad_norm=0.1)),
    "fused AdamW and SGD": (partial(AdamW, lr=0.01, fused=True), MOMENTUM),
    "8-bit LAMB and Adagrad": (partial(LAMB8bit, lr=0.01, min_8bit_size=8), partial(Adagrad, lr=0.1)),
}
PAIRS = [
    pytest.param(pair, id=name, marks=[needs_muon] if "Muon" in name else []) for name, pair in PAIRS.items()
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3))


def two_groups(module):
    """The matrices of the hidden layers, and the rest in two groups, all with names."""
    named = dict(module.named_parameters())
    matrices = [(name, named[name]) for name in ("1.weight", "3.weight")]
    biases = [(name, p) for name, p in named.items() if p.ndim == 1]
    rest = [(name, named[name]) for name in ("0.weight", "4.weight")]
    return [{"params": rest, "name": "rest"}, {"params": biases, "name": "biases", "weight_decay": 0.0}], [
        {"params": matrices, "name": "matrices"}
    ]


DEFAULT = (partial(LAMB, lr=0.01), MOMENTUM)


def built(module, pair=DEFAULT):
    rest, matrices = two_groups(module)
    return CombinedOptimizer([pair[0](rest), pair[1](matrices)])


def loss_of(module, seed=0):
    words = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(module(words).mean(1), torch.tensor([0, 1, 2, 0]))


def step(module, *optimizers, seed=0):
    for each in optimizers:
        each.zero_grad()
    loss_of(module, seed).backward()
    for each in optimizers:
        each.step()


def assert_same(module, optimizer, other, *others):
    """Weights and states are equal, bit by bit."""
    for (name, p), q in zip(module.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        [theirs] = [each.state[q] for each in others if q in each.state]
        assert optimizer.state[p].keys() == theirs.keys() != set()
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), (name, key)


@pytest.mark.parametrize("pair", PAIRS)
def test_every_step_is_a_step_of_each_and_a_scheduler_sets_the_rates_of_both(pair):
    ours, theirs = net(), net()
    optimizer = built(ours, pair)
    rest, matrices = two_groups(theirs)
    others = [pair[0](rest), pair[1](matrices)]
    schedulers = [lr_scheduler.StepLR(each, 1, gamma=0.5) for each in (optimizer, *others)]
    for number in range(3):
        step(ours, optimizer, seed=number)
        step(theirs, *others, seed=number)
        for each in schedulers:
            each.step()
        assert_same(ours, optimizer, theirs, *others)
    assert len(optimizer.state) == len(list(ours.parameters()))


@pytest.mark.parametrize("pair", PAIRS)
def test_a_checkpoint_continues_and_numbers_parameters_over_all_groups(pair):
    straight, resumed = net(), net()
    optimizer = built(straight, pair)
    step(straight, optimizer)
    optimizer.param_groups[2]["lr"] = 0.003
    file = io.BytesIO()
    torch.save((straight.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    assert set(saved) == {"state", "param_groups"}
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2, 3, 4], [5, 6]]
    assert set(saved["state"]) == set(range(7))
    again = built(resumed, pair)
    scheduler = lr_scheduler.StepLR(again, 1, gamma=0.5)
    resumed.load_state_dict(weights)
    again.load_state_dict(saved)
    assert again.param_groups[2]["lr"] == 0.003
    assert [group["name"] for group in again.param_groups] == ["rest", "biases", "matrices"]
    step(straight, optimizer)
    step(resumed, again)
    assert_same(straight, optimizer, resumed, again)
    scheduler.step()  # reaches the groups that were loaded
    assert again.optimizers[1].param_groups[0]["lr"] == again.param_groups[2]["lr"] != 0.003


def test_a_checkpoint_is_matched_by_name_also_for_optimizers_of_torch():
    ours, theirs = net(), net()
    pair = (partial(Adam, lr=0.01), MOMENTUM)
    optimizer = built(ours, pair)
    step(ours, optimizer)
    rest, matrices = two_groups(theirs)
    matrices[0]["params"].reverse()
    reordered = CombinedOptimizer([pair[0](rest), pair[1](matrices)])
    reordered.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert reordered.param_groups[2]["param_names"] == ["3.weight", "1.weight"]
    theirs.load_state_dict(ours.state_dict())
    step(ours, optimizer)
    step(theirs, reordered)
    assert_same(ours, optimizer, theirs, reordered)


def snapshot(optimizer):
    """Everything that a failed load may not change."""
    held = [
        (id(each.param_groups), [id(group) for group in each.param_groups], id(each.state))
        for each in optimizer.optimizers
    ]
    own = [id(group) for group in optimizer.param_groups]
    return held, own, copy.deepcopy(optimizer.state_dict())


def assert_unchanged(optimizer, before):
    held, own, saved = snapshot(optimizer)
    assert (held, own) == before[:2]
    assert str(saved) == str(before[2])


def without(saved, name):
    saved["param_groups"] = [group for group in saved["param_groups"] if group["name"] != name]


def break_last(saved):
    saved["state"][6]["exp_avg"] = torch.zeros(3)


def rename(saved):
    saved["param_groups"][0]["param_names"][0] = "other"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda saved: without(saved, "biases"), r"must have the parameter groups of the optimizer"),
        (rename, r"does not have '0.weight'"),
        (lambda saved: saved.pop("state"), r'with "state" and "param_groups"'),
        (break_last, r"in the shape of the parameter"),
        (lambda saved: saved.update(optimizers=[{}]), r"must be of 2 optimizers, got one of 1"),
    ],
    ids=["a group is missing", "another name", "no state", "the last part", "of fewer"],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(spoil, said):
    module = net()
    optimizer = built(module, (partial(AdamW, lr=0.01), partial(LAMB, lr=0.01)))
    step(module, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    step(module, optimizer)
    before = snapshot(optimizer)
    spoil(saved)
    with pytest.raises(ValueError, match=said):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
    step(module, optimizer)


def test_a_hook_after_loading_that_raises_changes_nothing():
    module = net()
    optimizer = built(module)
    saved = copy.deepcopy(optimizer.state_dict())
    step(module, optimizer)
    before = snapshot(optimizer)

    def refuse(_):
        assert not optimizer.state
        raise RuntimeError("no")

    optimizer.register_load_state_dict_post_hook(refuse)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


def test_copies_and_pickles_continue_as_the_original():
    module = net()
    optimizer = built(module)
    step(module, optimizer)
    copied, of_copy = copy.deepcopy((module, optimizer))
    sent, of_sent = pickle.loads(pickle.dumps((module, optimizer)))
    step(module, optimizer)
    for other, its in ((copied, of_copy), (sent, of_sent)):
        step(other, its)
        assert_same(module, optimizer, other, its)
        its.param_groups[2]["lr"] = 7.0
        assert its.optimizers[1].param_groups[0]["lr"] == 7.0
        assert optimizer.param_groups[2]["lr"] == 0.1


def test_hooks_run_once_and_a_closure_is_evaluated_once_with_gradients():
    module = net()
    optimizer = built(module)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: calls.append(saved.pop("mine")))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = loss_of(module)
        loss.backward()
        return loss

    expected = loss_of(module).item()
    with torch.no_grad():
        assert optimizer.step(closure).item() == expected
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert calls == ["before", "closure", "after", "saving", 1, "loaded"]
    assert saved["mine"] == 1  # the caller's


@pytest.mark.parametrize("is_finite", [True, False])
def test_a_gradient_scaler_unscales_and_skips_both_also_fused_ones(is_finite):
    scaled, plain = net(), net()
    pair = (partial(AdamW, lr=0.01, fused=True), MOMENTUM)
    optimizer, other = built(scaled, pair), built(plain, pair)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(scaled)).backward()
    if not is_finite:
        scaled[4].bias.grad[0] = torch.inf
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(scaled.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    if is_finite:
        loss_of(plain).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        other.step()
        for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    else:
        assert not optimizer.state
        assert scaler.get_scale() == 512.0
        for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q)


def test_groups_are_added_to_the_optimizer_that_is_named_and_come_last():
    module = net()
    rest, matrices = two_groups(module)
    late = {"params": rest.pop(0)["params"], "name": "late"}
    optimizer = CombinedOptimizer([LAMB(rest, lr=0.01), MOMENTUM(matrices)])
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match=r"to must be one of the optimizers, \['LAMB', 'SGD'\], got None"):
        optimizer.add_param_group(late)
    with pytest.raises(ValueError, match="must hold no parameter that is already in a group"):
        optimizer.add_param_group({"params": [module[1].weight]}, to=optimizer.optimizers[0])
    lamb = optimizer.optimizers[0]
    optimizer.add_param_group({**late, "lr": 0.5}, to=lamb)
    assert [group["name"] for group in optimizer.param_groups] == ["biases", "matrices", "late"]
    assert lamb.param_groups[1] is optimizer.param_groups[2]
    step(module, optimizer)
    assert len(lamb.state) == 5
    assert scheduler.base_lrs == [0.01, 0.1]  # in the order in which it knows the groups
    saved = optimizer.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1, 2], [3, 4], [5, 6]]
    again = copy.deepcopy(optimizer)
    assert [group["name"] for group in again.param_groups] == ["biases", "matrices", "late"]
    again.load_state_dict(saved)
    assert again.param_groups[2] is again.optimizers[0].param_groups[1]
    assert again.param_groups[2]["lr"] == 0.5
    assert set(again.state[again.param_groups[1]["params"][0]]) == {"momentum_buffer"}


def test_groups_added_to_one_of_them_directly_are_adopted():
    module = net()
    rest, matrices = two_groups(module)
    late = rest.pop(0)
    optimizer = CombinedOptimizer([LAMB(rest, lr=0.01), MOMENTUM(matrices)])
    optimizer.optimizers[0].add_param_group(late)
    step(module, optimizer)
    assert [group["name"] for group in optimizer.param_groups] == ["biases", "matrices", "rest"]
    optimizer.param_groups.pop()
    assert len(optimizer.state_dict()["param_groups"]) == 2
    assert [group["name"] for group in optimizer.optimizers[0].param_groups] == ["biases"]


def test_groups_that_other_code_splits_stay_with_their_optimizer_and_others_are_refused():
    module, other = net(), net()
    optimizer, whole = built(module), built(other)
    first, *others = optimizer.param_groups
    parts = [{**first, "params": [p], "param_names": [name]}
             for p, name in zip(first["params"], first["param_names"], strict=True)]  # fmt: skip
    optimizer.param_groups[:] = [*parts, *others]
    step(module, optimizer)
    step(other, whole)
    assert_same(module, optimizer, other, whole)
    assert len(optimizer.optimizers[0].param_groups) == 3
    mixed = {**first, "params": [*first["params"], *others[1]["params"]], "name": "mixed"}
    optimizer.param_groups[:] = [mixed, others[0]]
    weights = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="groups of one optimizer's parameters each, got 'mixed'"):
        step(module, optimizer)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


def test_the_state_is_written_through():
    """As Lightning does when it moves a state to another device."""
    module = net()
    optimizer = built(module)
    step(module, optimizer)
    p = module[1].weight
    optimizer.state[p] = {"momentum_buffer": torch.ones_like(p)}
    assert optimizer.optimizers[1].state[p]["momentum_buffer"].sum() == p.numel()
    assert p in optimizer.state
    del optimizer.state[p]
    assert p not in optimizer.optimizers[1].state
    assert optimizer.state[p] == {}
    with pytest.raises(KeyError):
        optimizer.state[torch.ones(1)]
    optimizer.state = {module[0].weight: {"step": torch.ones(())}}
    assert [len(each.state) for each in optimizer.optimizers] == [1, 0]
    optimizer.state.clear()
    assert not optimizer.state


def test_trust_ratios_are_those_of_the_optimizers_that_have_them():
    module = net()
    lars = LARS([module[1].weight, module[3].weight], lr=1.0)
    adam = Adam([module[0].weight, module[4].weight])
    optimizer = CombinedOptimizer([adam, lars])
    step(module, optimizer)
    ratios = optimizer.trust_ratios()
    assert list(ratios) == ["2", "3"]  # the numbers in the state dict
    assert ratios["3"] == lars.trust_ratios()["1"]
    assert "LARS (" in repr(optimizer)


class Unusual(SGD):
    """Keeps state that belongs to no parameter, beside and in its state."""

    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)
        self.state["all"]["seen"] = 0
        self.own = 0

    def step(self, closure=None):
        super().step(closure)
        self.state["all"]["seen"] += 1
        self.own += 1

    def state_dict(self):
        return {**super().state_dict(), "own": self.own}

    def load_state_dict(self, state_dict):
        self.own = state_dict["own"]
        super().load_state_dict(state_dict)


def test_state_that_belongs_to_no_parameter_stays_with_its_optimizer():
    module = net()
    pair = (partial(Unusual, lr=0.1), partial(Unusual, lr=0.2, momentum=0.9))
    optimizer = built(module, pair)
    step(module, optimizer)
    optimizer.optimizers[1].own = 5
    saved = copy.deepcopy(optimizer.state_dict())
    again = built(module, pair)
    again.load_state_dict(saved)
    assert [each.own for each in again.optimizers] == [1, 5]
    assert [each.state["all"] for each in again.optimizers] == [{"seen": 1}] * 2


def test_optimizers_that_do_not_fit_together_are_refused():
    module = net()
    first, second = SGD([module[1].weight], lr=0.1), Adam(module[1].named_parameters())
    with pytest.raises(ValueError, match="no parameter in common, got 'weight' in SGD and in Adam"):
        CombinedOptimizer([first, second])
    with pytest.raises(ValueError, match="no parameter in common, got '0' in SGD and in SGD"):
        CombinedOptimizer([first, first])
    with pytest.raises(TypeError, match=r"must be torch.optim optimizers, got <class 'torch.optim.sgd.SGD'>"):
        CombinedOptimizer([SGD])
    with pytest.raises(ValueError, match="must hold at least one, got none"):
        CombinedOptimizer([])
    with pytest.raises(ValueError, match="must step without a closure, got LBFGS"):
        CombinedOptimizer([first, torch.optim.LBFGS(module[3].parameters())])


def test_what_all_have_is_what_a_schedule_of_momentum_finds():
    module = net()
    both = built(module, (partial(LARS, lr=1.0), MOMENTUM))
    lr_scheduler.OneCycleLR(both, max_lr=[1.0, 1.0, 0.1], total_steps=4)
    assert [group["momentum"] for group in both.param_groups] == [0.95, 0.95, 0.95]
    with pytest.raises(ValueError, match="must support momentum"):
        lr_scheduler.OneCycleLR(built(net()), max_lr=0.1, total_steps=4)
