"""Statistics of layers over steps, in which not every layer takes part."""

import pytest
import torch

from lightning_lars.trust_ratios.layer_statistics import LayerStatistics


def test_each_layer_counts_its_own_steps():
    statistics = LayerStatistics()
    steps = [{"a": 1.0, "b": 4.0}, {"b": 2.0}, {"b": 9.0, "c": -1.0}, {"c": 3.0, "a": 2.0}]
    for step in steps:
        statistics.update(list(step), torch.tensor(list(step.values()), dtype=torch.float64))
    seen = {layer: [step[layer] for step in steps if layer in step] for layer in "abc"}
    assert statistics.layers == ["a", "b", "c"]
    expected = [[sum(v) / len(v), min(v), max(v), len(v)] for v in seen.values()]
    torch.testing.assert_close(statistics.compute(), torch.tensor(expected, dtype=torch.float64).T)


def test_it_starts_over_with_other_layers_and_another_dtype():
    statistics = LayerStatistics()
    statistics.update(["a", "b"], torch.tensor([1.0, 2.0]))
    statistics.reset()
    assert statistics.layers == []
    statistics.update(["c"], torch.tensor([5.0], dtype=torch.float64))
    torch.testing.assert_close(statistics.compute(), torch.tensor([[5.0]] * 3 + [[1.0]]).double())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_value_only_affects_its_own_layer(bad):
    statistics = LayerStatistics()
    statistics.update(["a", "b"], torch.tensor([1.0, 1.0]))
    statistics.update(["a", "b"], torch.tensor([bad, 3.0]))
    mean, _, maximum, _ = statistics.compute()
    assert not mean[0].isfinite()
    assert (mean[1], maximum[1]) == (2.0, 3.0)
