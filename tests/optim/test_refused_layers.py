"""Gradients and parameters that a step refuses, before anything has moved."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from lightning_lars import LAMB, LARS

both = pytest.mark.parametrize("optimizer_class", [LARS, LAMB])


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def assert_refused(optimizer_class, refused, match, **group):
    first = Parameter(torch.ones(3))
    first.grad = torch.ones(3)
    optimizer = optimizer_class([{"params": [("first", first)]}, {"params": [("second", refused)], **group}])
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert torch.equal(first, torch.ones(3))
    assert not optimizer.state
    assert optimizer.trust_ratios() == {}


@both
def test_a_sparse_gradient_is_refused_by_the_name_of_its_parameter(optimizer_class):
    weight = Parameter(torch.ones(4, 2))
    torch.nn.functional.embedding(torch.tensor([1]), weight, sparse=True).sum().backward()
    assert_refused(optimizer_class, weight, "'second'.*sparse=False")


@both
def test_a_sparse_gradient_of_an_unnamed_parameter_is_refused_by_its_number(optimizer_class):
    weight = Parameter(torch.ones(4, 2))
    torch.nn.functional.embedding(torch.tensor([1]), weight, sparse=True).sum().backward()
    with pytest.raises(RuntimeError, match="parameter '1'"):
        optimizer_class([Parameter(torch.ones(2)), weight]).step()


@both
@pytest.mark.parametrize("group", [{}, {"layer_adaptation": False}], ids=str)
def test_a_dtensor_is_refused_by_name(optimizer_class, mesh, group):
    weight = Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    weight.grad = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    assert_refused(optimizer_class, weight, "'second' is sharded.*strategy", **group)


@both
@pytest.mark.parametrize("mark", ["_fsdp_flattened", "_is_flat_param"])
def test_a_flattened_parameter_is_refused_by_name(optimizer_class, mark):
    weight = Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    setattr(weight, mark, True)
    assert_refused(optimizer_class, weight, "'second' is sharded.*strategy")
