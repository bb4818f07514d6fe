"""Gradients and parameters that a step refuses, before anything has moved."""

import gc

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import Parameter

from lightning_lars import LAMB, LARS

both = pytest.mark.parametrize("optimizer_class", [LARS, LAMB])


def assert_refused(optimizer_class, refused, match, **group):
    first = Parameter(torch.ones(3))
    first.grad = torch.ones(3)
    optimizer = optimizer_class([{"params": [("first", first)]}, {"params": [("second", refused)], **group}])
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert torch.equal(first, torch.ones(3))
    assert not optimizer.state
    assert optimizer.trust_ratios() == {}


def in_fsdp(use_orig_params):
    module = FullyShardedDataParallel(
        torch.nn.Linear(3, 2),
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.NO_SHARD,
        use_orig_params=use_orig_params,
    )
    module(torch.ones(1, 3)).sum().backward()
    return module


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
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.bool])
def test_quantized_weights_that_are_frozen_are_refused_with_a_remedy(optimizer_class, dtype):
    frozen = Parameter(torch.ones(4, dtype=dtype), requires_grad=False)
    trained = Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=rf"parameter 1 of {dtype}.* filter by requires_grad"):
        optimizer_class([trained, frozen])
    optimizer = optimizer_class([trained])
    with pytest.raises(ValueError, match=r"'quantized'.*filter by requires_grad"):
        optimizer.add_param_group({"params": [("quantized", frozen)]})
    assert len(optimizer.param_groups) == 1
    optimizer_class([p for p in (trained, frozen) if p.requires_grad])


@both
@pytest.mark.parametrize("group", [{}, {"layer_adaptation": False}], ids=str)
def test_a_dtensor_of_partial_values_is_refused_by_name(optimizer_class, mesh, group):
    weight = Parameter(DTensor.from_local(torch.ones(4, 2), mesh, [Partial()]))
    weight.grad = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
    assert_refused(optimizer_class, weight, "'second' has Partial values.*Shard or Replicate", **group)


@both
def test_a_plain_gradient_of_a_dtensor_is_refused_by_name(optimizer_class, mesh):
    weight = Parameter(DTensor.from_local(torch.ones(4, 2), mesh, [Replicate()]))
    weight.grad = torch.ones(4, 2)
    assert_refused(optimizer_class, weight, "'second'.*distribute_tensor")


@both
def test_a_flat_parameter_of_many_layers_is_refused_by_name(optimizer_class):
    weight = Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    weight._is_flat_param = True
    assert_refused(optimizer_class, weight, "'second'.*use_orig_params=True")


@both
def test_fsdp_that_has_flattened_its_layers_is_refused(optimizer_class, mesh):
    module = in_fsdp(use_orig_params=False)
    optimizer = optimizer_class(module.parameters())
    with pytest.raises(RuntimeError, match=r"all layers of an FSDP unit in one tensor.*use_orig_params=True"):
        optimizer.step()
    assert not optimizer.state


@both
def test_a_shard_whose_module_is_gone_is_refused_by_name(optimizer_class):
    weight = Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    weight._fsdp_flattened = True
    assert_refused(optimizer_class, weight, "'second' is a shard of FSDP, but.*is gone")


@both
def test_a_shard_whose_module_cannot_be_found_is_refused(optimizer_class, mesh):
    module = in_fsdp(use_orig_params=True)
    optimizer = optimizer_class(module.parameters())
    gc.freeze()
    try:
        with pytest.raises(RuntimeError, match=r"hidden by gc.freeze"):
            optimizer.step()
    finally:
        gc.unfreeze()
    assert not optimizer.state
    optimizer.step()


def test_a_failed_fsdp_wrapper_does_not_hide_the_others(mesh):
    failed = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    torch.nn.Module.__init__(failed)
    module = in_fsdp(use_orig_params=True)
    optimizer = LARS(module.parameters(), lr=0.1)
    optimizer.step()
    assert len(optimizer.trust_ratios()) == 2


@both
@pytest.mark.parametrize("groups_at_once", [1, 2])
def test_layers_flattened_into_one_tensor_are_refused(optimizer_class, groups_at_once):
    params = [Parameter(torch.ones(2, 3)), Parameter(torch.ones(4))]
    optimizer = optimizer_class([{"params": [p]} for p in params])
    partitions = [{**group, "params": [Parameter(torch.ones(5))]} for group in optimizer.param_groups]
    for group in partitions:
        group["params"][0].grad = torch.ones(5)
    optimizer.param_groups = partitions[:groups_at_once]  # ZeRO steps one group after the other
    with pytest.raises(RuntimeError, match=r"shape \(5,\) is not a layer that.*ZeRO stage 0"):
        optimizer.step()
    assert torch.equal(partitions[0]["params"][0], torch.ones(5))
    assert not optimizer.state


@both
def test_a_flat_tensor_in_place_of_named_layers_is_refused_whatever_its_shape(optimizer_class):
    params = [
        ("one", Parameter(torch.ones(2))),
        ("two", Parameter(torch.ones(2))),
        ("sum", Parameter(torch.ones(4))),
    ]
    optimizer = optimizer_class(params)
    flat = Parameter(torch.ones(4))
    flat.grad = torch.ones(4)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"'0' of shape \(4,\) is not a layer that.*ZeRO stage 0"):
        optimizer.step()


@both
def test_a_flat_tensor_is_refused_after_a_state_dict_was_loaded_into_it(optimizer_class):
    optimizer = optimizer_class([Parameter(torch.ones(2, 3))])
    flat = Parameter(torch.ones(6))
    flat.grad = torch.ones(6)
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="ZeRO stage 0"):
        optimizer.step()


@both
def test_a_lazy_layer_may_get_its_shape_after_the_optimizer_was_built(optimizer_class):
    module = torch.nn.LazyLinear(2)
    optimizer = optimizer_class(module.parameters(), lr=0.1)
    module(torch.ones(1, 3)).sum().backward()
    before = module.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(module.weight, before)


def test_max_grad_norm_is_refused_where_layers_are_partitioned_among_ranks(mesh):
    params = [Parameter(torch.ones(3))]
    params[0].grad = torch.ones(3)
    optimizer = ZeroRedundancyOptimizer(params, LARS, max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"max_grad_norm must be None.*gradient_clip_val"):
        optimizer.step()
    assert torch.equal(params[0], torch.ones(3))
