"""What LAMB promises beside its formula: AdamW where excluded, and the laws of its options."""

import pytest
import torch

from lightning_lars import LAMB
from tests.support.layers import give_gradients, layers, values, walk

ADAMW_OPTIONS = [
    {},
    {"betas": (0.5, 0.9)},
    {"eps": 0.1},
    {"weight_decay": 0.0},
    {"weight_decay": 0.3, "decoupled_weight_decay": True},
    {"maximize": True},
]


@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=str)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_without_layer_adaptation_lamb_is_adamw_up_to_rounding(options, tensor_lr):
    params, other = layers(torch.float64), layers(torch.float64)
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    lamb = LAMB([{"params": list(params.items()), "layer_adaptation": False}], lr=lr, **options)
    own = {key: value for key, value in options.items() if key != "decoupled_weight_decay"}
    adamw = torch.optim.AdamW(other.items(), lr=0.1, **{"eps": 1e-6, "weight_decay": 0.01, **own})
    for step in range(4):
        walk(lamb, range(step, step + 1))
        walk(adamw, range(step, step + 1))
        torch.testing.assert_close(values(params), values(other), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_the_step_does_not_depend_on_the_scale_of_the_gradient(factor):
    params, other = layers(torch.float64), layers(torch.float64)
    for own, scale in ((params, 1.0), (other, factor)):
        optimizer = LAMB(own.items(), eps=0.0)
        for step in range(3):
            give_gradients(own.values(), step)
            for p in own.values():
                p.grad *= scale
            optimizer.step()
    torch.testing.assert_close(values(params), values(other), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("trust_clip", "allowed"), [(0.125, {0.125}), ((40.0, 50.0), {40.0}), ((0.0, 0.125), {0.125})]
)
def test_trust_clip_bounds_the_trust_ratio(trust_clip, allowed):
    optimizer = LAMB(layers().items(), trust_clip=trust_clip)
    walk(optimizer, range(1))
    assert {ratio.item() for ratio in optimizer.trust_ratios().values()} == allowed


def test_max_weight_norm_bounds_the_length_of_a_step():
    params = layers(torch.float64)
    before = values(params)
    optimizer = LAMB(params.items(), lr=0.5, max_weight_norm=0.1)
    give_gradients(params.values(), 0)
    optimizer.step()
    for name, p in params.items():
        assert before[name].norm() > 0.1
        torch.testing.assert_close((p - before[name]).norm(), torch.tensor(0.5 * 0.1, dtype=torch.float64))


def test_decoupled_decay_shrinks_the_weights_whatever_their_trust_ratio():
    params = layers(torch.float64)
    before = values(params)
    optimizer = LAMB(params.items(), lr=0.5, weight_decay=0.1, decoupled_weight_decay=True)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(values(params), {name: (1 - 0.5 * 0.1) * w for name, w in before.items()})


def test_the_first_steps_with_bias_correction_are_accurate_at_betas_near_one():
    """In float32, 1 - 0.9999 alone is off by 1e-4; the direction of the first step is the sign of g."""
    params = layers()
    before = values(params)
    betas = (0.9999, 0.99999)
    optimizer = LAMB(
        [{"params": list(params.items()), "layer_adaptation": False}], lr=1.0, betas=betas, eps=0.0
    )
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    give_gradients(params.values(), 0)
    optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), before[name] - p.grad.sign(), rtol=1e-6, atol=1e-6)
