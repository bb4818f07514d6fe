"""Layers are updated in batches that bound the scratch memory, as large as the back end allows."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from lightning_lars import LAMB, LARS, LAMB8bit, LARS8bit
from lightning_lars.optim import batches
from lightning_lars.optim.backends import choice
from lightning_lars.optim.backends.eager import Eager
from tests.support.layers import give_gradients
from tests.support.slow import slow_unless


@given(sizes=st.lists(st.integers(0, 9), min_size=1), most=st.integers(1, 20))
def test_a_batch_is_divided_in_order_into_the_largest_parts_within_the_bound(sizes, most):
    params = [Parameter(torch.zeros(size)) for size in sizes]
    lists = [params, list(map(torch.zeros, sizes)), list(map(torch.ones, sizes)), [{} for _ in sizes]]
    whole = batches.Batch({}, None, *lists, is_sharded=False, is_first=True, adapts_direction=True)
    with patch.object(batches, "_MAX_BATCH_ELEMENTS_ON_CPU", most):
        parts = batches.divide(whole, in_kernel=False)
    for number, name in enumerate(("params", "weights", "grads", "states")):
        divided = [value for part in parts for value in getattr(part, name)]
        assert list(map(id, divided)) == list(map(id, lists[number]))
    counts = [[w.numel() for w in part.weights] for part in parts]
    assert all(sum(of_part) <= most or len(of_part) == 1 for of_part in counts)
    assert all(sum(first) + then[0] > most for first, then in pairwise(counts))
    assert all(part.adapts_direction and part.is_first and part.group is whole.group for part in parts)


@pytest.fixture
def measured(monkeypatch):
    """Triton's kernels where there is no GPU, the smallest batches, and the batches that are measured."""
    pytest.importorskip("triton", minversion="3.3", reason="there is no triton for this system")
    from lightning_lars.optim.backends.triton import Triton

    if not torch.cuda.is_available():
        monkeypatch.setattr(choice, "TRITON_DEVICES", {"cpu"})
    for bound in ("_MAX_BATCH_ELEMENTS", "_MAX_BATCH_ELEMENTS_ON_CPU", "_MAX_BATCH_ELEMENTS_IN_KERNEL"):
        monkeypatch.setattr(batches, bound, 1)
    seen = []
    for backend in (Eager, Triton):
        measure = backend.measure

        def recorded(self, measure=measure):
            seen.append((type(self).__name__, len(self.batch.params), self.batch.in_eight_bit))
            return measure(self)

        monkeypatch.setattr(backend, "measure", recorded)
    return seen


def two_steps(optimizer_class, shapes, measured, memory_format=torch.contiguous_format, **options):
    """Take two steps, and return the batches of the second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    params = [Parameter(torch.ones(shape, device=device).to(memory_format=memory_format)) for shape in shapes]
    optimizer = optimizer_class(params, **options)
    for step in range(2):
        measured.clear()
        give_gradients(params, step)
        optimizer.step()
    return measured


@pytest.mark.parametrize("optimizer_class", [LARS8bit, slow_unless(False, LAMB8bit)])
def test_all_layers_with_8_bit_state_that_a_kernel_reads_are_one_batch(optimizer_class, measured):
    seen = two_steps(optimizer_class, [(256,), (2, 256), (3, 256)], measured, min_8bit_size=256)
    assert seen == [("Triton", 3, True)]


@pytest.mark.parametrize("optimizer_class", [LARS8bit, slow_unless(False, LAMB8bit)])
def test_8_bit_state_that_is_unpacked_is_unpacked_batch_by_batch(optimizer_class, measured):
    shapes = [(4, 4, 4, 4)] * 3
    seen = two_steps(optimizer_class, shapes, measured, torch.channels_last, min_8bit_size=256)
    assert seen == [("Triton", 1, False)] * 3
    assert (
        two_steps(optimizer_class, shapes, measured, min_8bit_size=256, fused=False)
        == [("Eager", 1, False)] * 3
    )


def test_only_directions_need_several_batches_in_a_kernel(measured):
    assert two_steps(LARS, [(2,), (3,)], measured) == [("Triton", 2, False)]
    assert two_steps(LAMB, [(2,), (3,)], measured) == [("Triton", 1, False)] * 2


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_layers_that_no_kernel_supports_are_divided_on_a_gpu_too(optimizer_class, measured):
    with patch.object(choice, "_are_plain", lambda tensors: False):
        assert two_steps(optimizer_class, [(2,), (3,)], measured) == [("Eager", 1, False)] * 2
