"""On devices without double precision, such as a Mac's GPU, no float64 tensor is created."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lars import LAMB, LARS
from lightning_lars.batch_norm import PopulationStatistics
from lightning_lars.gradients.backward_norms import BackwardNorms
from lightning_lars.gradients.noise_scale import MovingNoiseScale
from lightning_lars.gradients.norms import gradient_norms
from lightning_lars.gradients.percentile_clipping import PercentileClipping
from lightning_lars.sharding import norms
from lightning_lars.sharding.shards import Shard
from lightning_lars.trust_ratios.step_statistics import StepStatistics
from tests.support.releases import has

# Tensors of this device have no values, which is as well: nothing here may read one.
DEVICE = torch.device("meta")


class NoFloat64(TorchDispatchMode):
    """Fails as such a device does, at every tensor of it in double precision."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.device == DEVICE and each.dtype == torch.float64:
                raise TypeError(f"{DEVICE} has no float64: {func}")
        return out


@pytest.fixture(autouse=True)
def _without_float64(monkeypatch):
    assert {"mps"} == norms._WITHOUT_FLOAT64
    monkeypatch.setattr(norms, "_WITHOUT_FLOAT64", {DEVICE.type})
    with NoFloat64():
        yield


def layers(*devices):
    params = []
    for device in devices:
        p = nn.Parameter(torch.ones(3, 2, device=device))
        p.grad = torch.ones_like(p)
        params.append(p)
    return params


def test_the_device_of_these_tests_refuses_float64():
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros(1, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
@pytest.mark.parametrize(
    ("devices", "max_grad_norm"),
    [([DEVICE, DEVICE], None), ([DEVICE, DEVICE], 1.0), ([DEVICE, "cpu"], None)],
    ids=["one device", "clipped", "the CPU too"],
)
def test_statistics_of_steps(optimizer_class, devices, max_grad_norm):
    named = list(zip("ab", layers(*devices), strict=True))
    optimizer = optimizer_class(named, lr=1.0, fused=False, max_grad_norm=max_grad_norm)
    statistics = StepStatistics(optimizer, lambda: True)
    optimizer.step()
    assert len({quantity for quantity, _ in statistics._statistics.labels}) == 8
    assert statistics._statistics.total.device == DEVICE
    assert statistics._first_steps[0][1].device == DEVICE


def test_norms_of_gradients_on_it_and_elsewhere():
    params = layers(DEVICE, "cpu")
    assert gradient_norms(params, {}, DEVICE).dtype == torch.float32
    assert gradient_norms(layers("cpu"), {}, torch.device("cpu")).dtype == torch.float64


def test_norms_of_shards():
    of_parts = [torch.ones((), device=DEVICE), None, torch.ones((), device=DEVICE)]
    whole = norms.whole_norms(of_parts, [Shard((), DEVICE)] * 3)
    assert [norm.dtype for norm in whole] == [torch.float32] * 3


def test_callbacks_that_average():
    backward = BackwardNorms(layers(DEVICE))
    backward.end_pass()
    moving = MovingNoiseScale(0.9)
    moving.update(backward.accumulated(), backward.accumulated())
    assert moving._sums.device == DEVICE
    if not has("torch>=2.14"):  # which computes quantiles of this device in float64 itself
        PercentileClipping(10.0, 5).scales(torch.ones(2, device=DEVICE))
    assert PopulationStatistics(nn.BatchNorm1d(3, device=DEVICE)).squares.dtype == torch.float32


@pytest.mark.parametrize(("has_float64", "expected"), [(True, torch.float64), (False, torch.float32)])
def test_an_intel_gpu_is_asked_whether_it_has_double_precision(monkeypatch, has_float64, expected):
    class Properties:
        has_fp64 = has_float64

    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: Properties)
    assert norms.widest_float(torch.device("xpu", 0)) == expected
