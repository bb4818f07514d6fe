"""The fused kernels of the CPU give what the single operations give, up to the rounding of float32."""

from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB, LARS
from tests.optim.layers import EXCLUDED, give_gradients, groups, layers, values, walk

FUSED = [
    (LARS, {}),
    (LARS, {"weight_decay": 0.1}),
    (LARS, {"weight_decay": 0.1, "dampening": 0.3}),
    (LARS, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (LARS, {"weight_decay": 0.1, "lr_in_momentum": True}),
    (LARS, {"weight_decay": 0.1, "trust_clip": "larc", "trust_coefficient": 0.5}),
    (LARS, {"trust_clip": 0.002, "max_grad_norm": 1.0, "maximize": True}),
    (LARS, {"nesterov": True}),
    (LARS, {"nesterov": True, "weight_decay": 0.1, "dampening": 0.3, "lr_in_momentum": True}),
    (LARS, {"momentum": 0.0, "weight_decay": 0.1}),
    (LARS, {"denominator": "decayed_gradient", "weight_decay": 0.1}),
    (LARS, {"denominator": "decayed_gradient", "nesterov": True, "trust_clip": "larc"}),
    (LARS, {"trust_coefficient": 1e-9, "weight_decay": 0.1}),
    (LAMB, {}),
    (LAMB, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (LAMB, {"betas": (0.0, 0.9), "eps": 1e-3, "max_grad_norm": 1.0, "maximize": True}),
    (LAMB, {"trust_clip": (0.1, 2.0), "max_weight_norm": 1.0}),
]
NOT_FUSED = [
    (LARS, {"denominator": "momentum"}),
    (LAMB, {"bias_correction": False}),
    (LAMB, {"grad_averaging": False}),
]
KERNEL = {LARS: "_fused_sgd_", LAMB: "_fused_adam_"}


class Calls:
    """Counts the calls of a kernel, which are made."""

    def __init__(self, optimizer_class):
        name = KERNEL[optimizer_class]
        self.patch = patch.object(torch, name, wraps=getattr(torch, name))

    def __enter__(self):
        return self.patch.__enter__()

    def __exit__(self, *args):
        self.patch.__exit__(*args)


def close(actual, expected, dtype=torch.float32):
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=2e-7)


def large_layers(dtype=torch.float32):
    """Layers that are worth a call of a kernel each, and one that is not."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv.weight": (64, 16, 3, 3), "linear.weight": (61, 97), "norm.bias": (61,)}
    return {name: Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in shapes.items()}


def compare(optimizer_class, options, dtype=torch.float32, steps=6, tensor_lr=False, layers=layers):
    """Walk with and without kernels side by side, and compare after every step; return the kernel's calls."""
    fused, single = layers(dtype), layers(dtype)
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    left = optimizer_class(groups(fused), lr=lr, **options)
    right = optimizer_class(groups(single), lr=lr, fused=False, **options)
    with Calls(optimizer_class) as kernel:
        for step in range(steps):
            walk(left, [step])
            calls = kernel.call_count
            walk(right, [step])
            assert kernel.call_count == calls
            close(values(fused), values(single), dtype)
            close(left.trust_ratios(), right.trust_ratios())
            for p, other in zip(fused.values(), single.values(), strict=True):
                assert left.state[p].keys() == right.state[other].keys()
                for key, state in left.state[p].items():
                    close(state, right.state[other][key], dtype)
    return calls


@pytest.mark.parametrize(("optimizer_class", "options"), FUSED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("layers", [layers, large_layers])
def test_the_kernels_give_the_steps_of_single_operations(optimizer_class, options, dtype, tensor_lr, layers):
    assert compare(optimizer_class, options, dtype, tensor_lr=tensor_lr, layers=layers) > 0


@pytest.mark.parametrize(("optimizer_class", "options"), NOT_FUSED, ids=str)
def test_what_no_kernel_does_is_done_by_single_operations(optimizer_class, options):
    def adapted_layers(dtype):
        return {name: p for name, p in layers(dtype).items() if name not in EXCLUDED}

    assert compare(optimizer_class, options, layers=adapted_layers) == 0


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_float64_is_left_to_single_operations(optimizer_class):
    assert compare(optimizer_class, {}, torch.float64) == 0


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_layers_that_are_not_contiguous_are_left_to_single_operations(optimizer_class):
    moved = []
    for fused in (None, False):
        weight = layers()["conv.weight"].detach().to(memory_format=torch.channels_last)
        p = torch.nn.Parameter(weight)
        optimizer = optimizer_class([p], fused=fused)
        with Calls(optimizer_class) as kernel:
            for step in range(3):
                give_gradients([p], step)
                p.grad = p.grad.to(memory_format=torch.channels_last)
                optimizer.step()
        assert kernel.call_count == 0
        moved.append(p.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_the_gradients_stay_as_they_are(optimizer_class):
    params = layers()
    give_gradients(params.values(), 0)
    before = [p.grad.clone() for p in params.values()]
    optimizer_class(groups(params), weight_decay=0.1).step()
    for p, grad in zip(params.values(), before, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
@pytest.mark.parametrize("first", [None, False])
def test_a_checkpoint_goes_on_with_the_kernels_or_without(optimizer_class, first):
    params = layers()
    optimizer = optimizer_class(groups(params), fused=first, weight_decay=0.1)
    walk(optimizer, range(3))
    saved, weights = deepcopy(optimizer.state_dict()), values(params)
    ends = []
    for fused in (None, False):
        own = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
        resumed = optimizer_class(groups(own), fused=fused, weight_decay=0.1)
        resumed.load_state_dict(deepcopy(saved))
        assert all(group["fused"] is fused for group in resumed.param_groups)
        walk(resumed, range(3, 6))
        ends.append(values(own))
    close(*ends)


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_spoils_no_other_layer(optimizer_class, bad):
    ends = []
    for fused in (None, False):
        params = layers()
        optimizer = optimizer_class(groups(params), fused=fused)
        give_gradients(params.values(), 0)
        params["linear.weight"].grad[0, 0] = bad
        optimizer.step()
        ends.append(values(params))
    for name, fused in ends[0].items():
        torch.testing.assert_close(fused, ends[1][name], rtol=1e-5, atol=2e-7, equal_nan=True)
        if name != "linear.weight":
            assert fused.isfinite().all()
