"""Hooks around state dicts have the last word, as in torch.optim."""

import copy

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit
from tests.support.eight_bit import needs_torchao
from tests.support.layers import give_gradients

LARGE, SMALL = (64, 128), (5,)  # of which the first is held in 8 bits

every = pytest.mark.parametrize("optimizer_class", [LARS, LAMB, LARS8bit, LAMB8bit])


def started(optimizer_class, **options):
    """An optimizer after a step."""
    if optimizer_class in (LARS8bit, LAMB8bit):
        needs_torchao()
    params = [Parameter(torch.full(shape, 2.0)) for shape in (LARGE, SMALL)]
    optimizer = optimizer_class(params, lr=0.1, **options)
    give_gradients(params, 0)
    optimizer.step()
    return optimizer


def moments(optimizer):
    """The state in floats, by parameter and key."""
    return [
        {key: value.dequantize() if hasattr(value, "qmap") else value.clone() for key, value in state.items()}
        for state in optimizer.state.values()
    ]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


@every
def test_a_hook_after_loading_may_clear_the_state(optimizer_class):
    saved = started(optimizer_class).state_dict()
    fresh = started(optimizer_class)
    fresh.register_load_state_dict_post_hook(lambda optimizer: optimizer.state.clear())
    fresh.load_state_dict(saved)
    assert not fresh.state


@every
def test_a_hook_after_loading_sees_and_changes_the_final_state(optimizer_class):
    source, fresh = started(optimizer_class), started(optimizer_class)
    seen = []

    def halve(optimizer):
        seen.extend(moments(optimizer))
        for state in optimizer.state.values():
            for key, value in state.items():
                state[key] = torch.full(value.shape, 0.5)

    fresh.register_load_state_dict_post_hook(halve)
    fresh.load_state_dict(source.state_dict())
    assert_same(seen, moments(source))
    for state in fresh.state.values():
        for value in state.values():
            assert torch.equal(
                value.dequantize() if hasattr(value, "qmap") else value, torch.full(value.shape, 0.5)
            )


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_a_hook_after_loading_may_change_the_dtype_of_the_state(optimizer_class):
    source, fresh = started(optimizer_class), started(optimizer_class)

    def in_double(optimizer):
        for state in optimizer.state.values():
            state.update({key: value.double() for key, value in state.items()})

    fresh.register_load_state_dict_post_hook(in_double)
    fresh.load_state_dict(source.state_dict())
    assert {value.dtype for state in fresh.state.values() for value in state.values()} == {torch.float64}


@every
def test_hooks_may_wrap_the_state_dict(optimizer_class):
    source, fresh = started(optimizer_class), started(optimizer_class)
    plain = copy.deepcopy(source.state_dict())
    source.register_state_dict_post_hook(lambda _, saved: {"version": 2, "optimizer": saved})
    fresh.register_load_state_dict_pre_hook(lambda _, saved: saved["optimizer"])
    wrapped = source.state_dict()
    assert wrapped.keys() == {"version", "optimizer"}
    assert_same(wrapped["optimizer"]["state"], plain["state"])
    fresh.load_state_dict(wrapped)
    assert_same(moments(fresh), moments(source))


@every
def test_a_hook_after_saving_sees_the_state_dict_that_is_returned(optimizer_class):
    optimizer = started(optimizer_class)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(saved))
    assert optimizer.state_dict() is seen[0]


@every
def test_hooks_run_once_in_the_order_of_torch(optimizer_class):
    calls = []
    for optimizer in (torch.optim.SGD([Parameter(torch.ones(2))]), started(optimizer_class)):
        ran = []
        optimizer.register_state_dict_pre_hook(lambda _, ran=ran: ran.append("before saving"))
        optimizer.register_state_dict_post_hook(lambda *_, ran=ran: ran.append("after saving"))
        optimizer.register_state_dict_post_hook(lambda *_, ran=ran: ran.append("first"), prepend=True)
        optimizer.register_load_state_dict_pre_hook(lambda *_, ran=ran: ran.append("before loading"))
        optimizer.register_load_state_dict_post_hook(lambda _, ran=ran: ran.append("after loading"))
        optimizer.register_load_state_dict_post_hook(
            lambda _, ran=ran: ran.append("first of all"), prepend=True
        )
        for _ in range(2):
            optimizer.load_state_dict(optimizer.state_dict())
        calls.append(ran)
    assert calls[0] == calls[1]


@every
@pytest.mark.parametrize("register", ["pre", "post"])
def test_a_hook_that_raises_leaves_the_optimizer_as_it_was(optimizer_class, register):
    optimizer = started(optimizer_class)
    saved = copy.deepcopy(optimizer.state_dict())
    give_gradients(optimizer.param_groups[0]["params"], 1)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.3
    before, ratios = moments(optimizer), optimizer.trust_ratios()

    def refuse(*_):
        raise RuntimeError("not this one")

    getattr(optimizer, f"register_load_state_dict_{register}_hook")(refuse)
    with pytest.raises(RuntimeError, match="not this one"):
        optimizer.load_state_dict(saved)
    assert_same(moments(optimizer), before)
    assert_same(optimizer.trust_ratios(), ratios)
    assert optimizer.param_groups[0]["lr"] == 0.3
