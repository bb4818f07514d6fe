"""Norms of layers: exact where half precision overflows and float32 sums lose digits."""

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB, LARS
from lightning_lars.sharding.norms import layer_norms


def test_the_norm_of_a_float16_layer_may_exceed_what_float16_can_hold():
    norm = layer_norms([torch.full((1000,), 6e4, dtype=torch.float16)])
    torch.testing.assert_close(norm, torch.full((1,), 6e4 * 1000**0.5), check_dtype=False)


def test_the_norm_of_sixteen_million_equal_numbers_is_accurate():
    norm = layer_norms([torch.full((2**24,), 0.1)])
    expected = torch.tensor(0.1).double() * 2**12
    torch.testing.assert_close(norm[0], expected, rtol=1e-6, atol=0.0, check_dtype=False)


def test_the_norms_come_in_the_order_of_the_layers():
    norms = layer_norms([torch.tensor(-2.0), torch.tensor([[3.0, 4.0]]), torch.empty(0), torch.zeros(2)])
    torch.testing.assert_close(norms, torch.tensor([2.0, 5.0, 0.0, 0.0]), check_dtype=False)


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_the_ratio_of_a_float16_layer_is_finite_where_its_norm_overflows(optimizer_class):
    p = Parameter(torch.full((1000,), 3e4, dtype=torch.float16))
    p.grad = torch.full_like(p, 6e4)
    optimizer = optimizer_class([("w", p)], lr=1e-3, weight_decay=0.0)
    optimizer.step()
    assert 0.0 < optimizer.trust_ratios()["w"] < torch.inf
    assert p.isfinite().all()


def test_max_grad_norm_bounds_a_gradient_whose_norm_float16_cannot_hold():
    p = Parameter(torch.ones(1000, dtype=torch.float16))
    p.grad = torch.full_like(p, 6e4)
    optimizer = LARS([{"params": [p], "layer_adaptation": False}], lr=1.0, momentum=0.0, max_grad_norm=1.0)
    optimizer.step()
    expected = torch.ones(1000) - 1000**-0.5
    torch.testing.assert_close(p.detach(), expected.half(), rtol=0.0, atol=2**-11)


@pytest.mark.parametrize("numel", [16_383, 16_384, 16_385, 100_003])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_of_a_long_layer_is_exact_to_the_last_digit_of_float32(numel, dtype):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double().square().sum().sqrt()
    (norm,) = layer_norms([x])
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(exact.item(), rel=1e-15 if dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e37])
def test_the_norm_of_a_long_layer_whose_squares_float32_cannot_hold(scale):
    x = scale * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    norms = layer_norms([x, x[:10]])
    for norm, layer in zip(norms, [x, x[:10]], strict=True):
        assert norm.item() == pytest.approx(layer.double().square().sum().sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_the_norm_of_a_long_layer_that_is_not_finite(bad):
    x = torch.ones(20_000)
    x[-1] = bad
    torch.testing.assert_close(layer_norms([x])[0].float(), torch.tensor(bad), equal_nan=True)


def test_the_norm_of_a_long_layer_is_independent_of_memory_format():
    x = torch.randn(16, 8, 14, 18, generator=torch.Generator().manual_seed(0))
    layers = [
        x,
        x.to(memory_format=torch.channels_last),
        x.transpose(0, 3),
        x[:, :, ::2],
        x.expand(2, 16, 8, 14, 18),
    ]
    for norm, layer in zip(layer_norms(layers), layers, strict=True):
        assert norm.item() == pytest.approx(layer.double().square().sum().sqrt().item(), rel=1e-7)
