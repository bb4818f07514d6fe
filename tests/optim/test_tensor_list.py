"""Arithmetic on the tensors of several layers: what it gives, in whose memory, and what it refuses."""

import pytest
import torch
from torch import sqrt

from lightning_lars.optim.backends.tensor_list import TensorList, per_layer_scalars


def some(value):
    return [torch.full((2, 3), value, dtype=torch.float64), torch.full((), value, dtype=torch.float64)]


def numbers(each):
    return [tensor.flatten()[0].item() for tensor in each.value()]


def test_equations_apply_to_each_layer():
    a, b, scales = TensorList(some(3.0)), TensorList(some(2.0)), per_layer_scalars(torch.tensor([10.0, 20.0]))
    assert numbers(a + 0.5 * b) == [4.0, 4.0]
    assert numbers(a - b) == [1.0, 1.0]
    assert numbers(scales * (a + b)) == [50.0, 100.0]
    assert numbers((a + b) / scales) == [0.5, 0.25]
    assert numbers(per_layer_scalars(torch.tensor(4.0)) * a) == [12.0, 12.0]
    assert numbers(a + 0.5 * b * b) == [5.0, 5.0]
    assert numbers(0.5 * b * b + a) == [5.0, 5.0]
    assert numbers(a * b / b + 1.0) == [4.0, 4.0]
    assert numbers(sqrt(a + 0.5 * b) / (b + 0.0)) == [1.0, 1.0]
    assert numbers(0.0 * 0.0 + a) == numbers(a) == [3.0, 3.0]


def test_only_moments_at_the_start_of_a_sum_and_intermediate_results_are_overwritten():
    w, g, moment = some(3.0), some(2.0), some(1.0)
    v = 0.5 * TensorList(moment, use="advance") + 2.0 * (TensorList(g) + 0.5 * TensorList(w))
    assert v.value() is moment
    assert numbers(v) == [7.5, 7.5]
    assert numbers(v / 2.0) == [3.75, 3.75]
    assert (numbers(v), numbers(TensorList(w)), numbers(TensorList(g))) == (
        [7.5, 7.5],
        [3.0, 3.0],
        [2.0, 2.0],
    )


def test_reading_an_overwritten_moment_raises():
    moment = TensorList(some(1.0), use="advance")
    _ = 0.5 * moment + TensorList(some(2.0))
    with pytest.raises(RuntimeError, match="reads a moment or an intermediate result after it was"):
        _ = TensorList(some(2.0)) + moment
    with pytest.raises(TypeError, match=r"equations are written in \+ - \* / and sqrt"):
        torch.exp(TensorList(some(1.0)))
