"""A step reads nothing back to the host, so that it never waits for the device."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lightning_lars import LAMB, LARS
from tests.support.layers import give_gradients, groups, layers

OPTIONS = [
    (LARS, {}),
    (LARS, {"trust_clip": "larc", "decoupled_weight_decay": True, "weight_decay": 0.1}),
    (LARS, {"trust_clip": 0.5, "denominator": "momentum", "nesterov": True, "weight_decay": 0.1}),
    (LARS, {"denominator": "decayed_gradient", "lr_in_momentum": True, "weight_decay": 0.1}),
    (LAMB, {}),
    (LAMB, {"trust_clip": (0.1, 2.0), "max_weight_norm": 1.0, "decoupled_weight_decay": True}),
]


def host_reads(action):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        action()
    names = ("aten::_local_scalar_dense", "aten::item")
    return sum(event.name in names for event in profiler.events())


def test_the_count_of_host_reads_sees_an_item_call():
    assert host_reads(lambda: torch.ones(1).item()) > 0


@pytest.mark.parametrize(("optimizer_class", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("max_grad_norm", [pytest.param(None, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_makes_no_device_to_host_copy(optimizer_class, options, tensor_lr, max_grad_norm, dtype):
    params = layers(dtype)
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    # Without the kernels for the CPU, where reading is free: this is the step that a GPU takes.
    optimizer = optimizer_class(groups(params), lr=lr, max_grad_norm=max_grad_norm, fused=False, **options)
    give_gradients(params.values(), 0)
    assert host_reads(optimizer.step) == 0
    give_gradients(params.values(), 1)
    assert host_reads(optimizer.step) == 0


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_reading_trust_ratios_makes_no_device_to_host_copy(optimizer_class):
    params = layers()
    optimizer = optimizer_class(groups(params))
    give_gradients(params.values(), 0)
    optimizer.step()
    assert host_reads(optimizer.trust_ratios) == 0
