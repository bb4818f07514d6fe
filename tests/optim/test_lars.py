"""What LARS promises beside its formula: SGD where excluded, and the laws of its options."""

import pytest
import torch

from lightning_lars import LARS
from tests.support.layers import give_gradients, layers, values, walk

SGD_OPTIONS = [
    {},
    {"momentum": 0.0},
    {"weight_decay": 0.1},
    {"nesterov": True},
    {"dampening": 0.3},
    {"maximize": True, "weight_decay": 0.1},
]


def beside_sgd(options, dtype, lr, fused):
    """Step LARS without adaptation and SGD; yield the parameters and states of both after each step."""
    params, other = layers(dtype), layers(dtype)
    options = {"lr": lr, "momentum": 0.9, **options}
    lars = LARS([{"params": list(params.items()), "layer_adaptation": False}], **options, fused=fused)
    sgd = torch.optim.SGD(other.items(), **options, fused=fused is None)
    for step in range(4):
        walk(lars, range(step, step + 1))
        walk(sgd, range(step, step + 1))
        yield (
            (values(params), [lars.state[p] for p in params.values()]),
            (values(other), [dict(sgd.state[p]) for p in other.values()]),
        )


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "fused"), [(torch.float64, False), (torch.float32, False), (torch.float32, None)], ids=str
)
def test_without_layer_adaptation_lars_is_sgd_bit_for_bit(options, dtype, fused):
    for lars, sgd in beside_sgd(options, dtype, lr=0.1, fused=fused):
        torch.testing.assert_close(lars, sgd, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_without_layer_adaptation_lars_is_sgd_up_to_rounding_under_a_tensor_lr(options):
    """SGD reads the tensor back to the host and multiplies inside of the addition; LARS cannot."""
    for lars, sgd in beside_sgd(
        options, torch.float64, lr=torch.tensor(0.1, dtype=torch.float64), fused=False
    ):
        torch.testing.assert_close(lars, sgd, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("denominator", ["gradient", "decayed_gradient", "momentum"])
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_the_step_does_not_depend_on_the_scale_of_the_gradient(denominator, factor):
    params, other = layers(torch.float64), layers(torch.float64)
    for own, scale in ((params, 1.0), (other, factor)):
        optimizer = LARS(own.items(), eps=0.0, denominator=denominator)
        for step in range(3):
            give_gradients(own.values(), step)
            for p in own.values():
                p.grad *= scale
            optimizer.step()
    torch.testing.assert_close(values(params), values(other), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("trust_coefficient", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("lr", [0.1, 3.0])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_no_layer_moves_faster_than_lr_under_larc(trust_coefficient, lr, tensor_lr):
    params = layers(torch.float64)
    before = values(params)
    optimizer = LARS(
        params.items(),
        lr=torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr,
        momentum=0.0,
        trust_coefficient=trust_coefficient,
        trust_clip="larc",
    )
    give_gradients(params.values(), 0)
    optimizer.step()
    for name, p in params.items():
        adapted = trust_coefficient * before[name].norm() / (p.grad.norm() + 1e-8)
        expected = before[name] - adapted.clamp(max=lr) * p.grad
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


def test_a_float_caps_the_trust_ratio():
    params = layers()
    optimizer = LARS(params.items(), trust_coefficient=100.0, trust_clip=0.125)
    walk(optimizer, range(1))
    assert {ratio.item() for ratio in optimizer.trust_ratios().values()} == {0.125}


def test_lr_inside_the_momentum_makes_no_difference_while_lr_is_constant():
    params, other = layers(torch.float64), layers(torch.float64)
    for own, inside in ((params, True), (other, False)):
        optimizer = LARS(own.items(), lr=0.3, weight_decay=0.1, lr_in_momentum=inside)
        for step in range(4):
            give_gradients(own.values(), step)
            optimizer.step()
    torch.testing.assert_close(values(params), values(other), rtol=1e-12, atol=1e-14)


def test_lr_inside_the_momentum_makes_a_difference_once_lr_changes():
    params, other = layers(), layers()
    walk(LARS(params.items(), trust_coefficient=0.1, lr_in_momentum=True), range(3))
    walk(LARS(other.items(), trust_coefficient=0.1, lr_in_momentum=False), range(3))
    assert not any(torch.allclose(p, other[name]) for name, p in params.items())


def test_a_zero_gradient_with_weight_decay_gets_the_adapted_decay():
    params = layers(torch.float64)
    before = values(params)
    optimizer = LARS(params.items(), lr=0.5, weight_decay=0.1, trust_coefficient=0.02, momentum=0.0)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    expected = {name: (1 - 0.5 * 0.02) * w for name, w in before.items()}
    torch.testing.assert_close(values(params), expected)
