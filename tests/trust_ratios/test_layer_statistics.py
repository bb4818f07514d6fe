"""Statistics of layers over steps, in which not every layer takes part."""

import pytest
import torch

from lightning_lars.trust_ratios.layer_statistics import LayerStatistics


def ratios_of(layers):
    return [("trust_ratio", layer) for layer in layers]


def test_each_layer_counts_its_own_steps():
    statistics = LayerStatistics()
    steps = [{"a": 1.0, "b": 4.0}, {"b": 2.0}, {"b": 9.0, "c": -1.0}, {"c": 3.0, "a": 2.0}]
    for step in steps:
        statistics.update(ratios_of(step), torch.tensor(list(step.values()), dtype=torch.float64))
    seen = {layer: [step[layer] for step in steps if layer in step] for layer in "abc"}
    assert statistics.labels == ratios_of("abc")
    expected = [[sum(v) / len(v), min(v), max(v), len(v)] for v in seen.values()]
    torch.testing.assert_close(statistics.compute(), torch.tensor(expected, dtype=torch.float64).T)


def test_it_starts_over_with_other_layers_and_another_dtype():
    statistics = LayerStatistics()
    statistics.update(ratios_of("ab"), torch.tensor([1.0, 2.0]))
    statistics.reset()
    assert statistics.labels == []
    statistics.update(ratios_of("c"), torch.tensor([5.0], dtype=torch.float64))
    torch.testing.assert_close(statistics.compute(), torch.tensor([[5.0]] * 3 + [[1.0]]).double())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_value_only_affects_its_own_layer(bad):
    statistics = LayerStatistics()
    statistics.update(ratios_of("ab"), torch.tensor([1.0, 1.0]))
    statistics.update(ratios_of("ab"), torch.tensor([bad, 3.0]))
    mean, _, maximum, _ = statistics.compute()
    assert not mean[0].isfinite()
    assert (mean[1], maximum[1]) == (2.0, 3.0)


def test_quantities_of_a_layer_are_apart_and_may_be_measured_in_some_steps_only():
    statistics = LayerStatistics()
    both = [*ratios_of("ab"), ("gradient_norm", "a")]
    for labels, values in (
        (ratios_of("ab"), [1.0, 2.0]),
        (both, [3.0, 4.0, 50.0]),
        ([both[2], both[0]], [70.0, 5.0]),
    ):
        statistics.update(labels, torch.tensor(values))
    assert statistics.labels == both
    expected = [[3.0, 3.0, 60.0], [1.0, 2.0, 50.0], [5.0, 4.0, 70.0], [3.0, 2.0, 2.0]]
    torch.testing.assert_close(statistics.compute(), torch.tensor(expected))


def test_values_of_another_dtype_are_added_wherever_their_labels_are():
    statistics = LayerStatistics()
    statistics.update(ratios_of("abc"), torch.tensor([1.0, 2.0, 3.0]))
    statistics.update(ratios_of("ca"), torch.tensor([5.0, 7.0], dtype=torch.float64))
    expected = [[4.0, 2.0, 4.0], [1.0, 2.0, 3.0], [7.0, 2.0, 5.0], [2.0, 1.0, 2.0]]
    torch.testing.assert_close(statistics.compute(), torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_steps_in_half_precision_are_counted(dtype):
    statistics = LayerStatistics()
    for step in range(600):
        statistics.update(ratios_of("a"), torch.tensor([step % 2], dtype=dtype))
    torch.testing.assert_close(statistics.compute(), torch.tensor([[0.5], [0.0], [1.0], [600.0]]))
