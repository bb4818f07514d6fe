"""What a step costs on up to thousands of ranks, of which one is simulated."""

import sys
from importlib.metadata import PackageNotFoundError
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("torch.testing._internal.distributed.fake_pg")

from benchmarks.model_shapes import grouped
from benchmarks.ranks import RING, TREE, collectives, host, lamb, latency
from benchmarks.sharded_models import MESHES, MODELS, gpt, narrowed, resnet, sharded, simulated
from lightning_lars import LAMB, LARS
from lightning_lars.sharding import shards
from tests.support.slow import slow_unless

TINY = gpt(width=64, depth=2)
ADAPTED = 2 * 4 + 2


@pytest.mark.parametrize("world_size", [slow_unless(size == 4096, size) for size in (8, 64, 4096)])
@pytest.mark.parametrize(("mesh", "exchanges"), [("FSDP2", 1), ("HSDP", 1), ("FSDP2 x TP", 2)])
def test_a_step_exchanges_two_norms_of_each_layer_however_many_ranks_there_are(mesh, exchanges, world_size):
    _, _, sent = collectives(TINY, mesh, world_size)
    # Tensor parallelism leaves the positions whole, which the other dimension shards.
    assert sent == [16 * ADAPTED, 16 * (ADAPTED - 1)][:exchanges]


def test_a_step_exchanges_sixteen_bytes_for_each_layer_however_large_it_is():
    sent = [collectives(gpt(width, depth=2), "FSDP2", 512)[2] for width in (64, 10240)]
    assert sent == [[16 * ADAPTED]] * 2


@pytest.mark.slow
def test_convolutions_of_a_residual_network_are_exchanged_at_once():
    parameters, layers, sent = collectives(MODELS["ResNet-50"](), "HSDP", 1024)
    assert (parameters, layers) == (25_557_032, 161)
    assert sent == [16 * 54]


@pytest.mark.parametrize("mesh", ["FSDP2", "FSDP2 x TP"])
@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_excluded_layers_move_while_norms_are_exchanged_and_the_others_after_it(optimizer_class, mesh):
    moved = []

    def have_moved():
        return [not torch.equal(p.to_local(), value) for p, value in zip(params, before, strict=True)]

    class Work:
        def wait(self):
            moved.append(("wait", *map(any, (have_moved()[:ADAPTED], have_moved()[ADAPTED:]))))

    def all_reduce(total, group, async_op):
        moved.append(("start", *map(any, (have_moved()[:ADAPTED], have_moved()[ADAPTED:]))))
        assert async_op
        return Work()

    with simulated(8):
        groups = grouped(list(sharded(TINY, MESHES[mesh](8), "cpu").parameters()))
        params = [p for group in groups for p in group["params"]]
        assert len(groups[0]["params"]) == ADAPTED
        for p in params:
            p.data.to_local().fill_(
                1.0
            )  # what simulated ranks send is not initialized, and NaN is unequal to NaN
        optimizer = optimizer_class(groups, lr=0.1)
        optimizer.step()  # the first one compares the layers of the ranks, too
        before = [p.to_local().clone() for p in params]
        with patch.object(shards.dist, "all_reduce", all_reduce):
            optimizer.step()
        assert all(have_moved())
    first = [("start", False, False), ("wait", False, True)]
    assert moved == (first if mesh == "FSDP2" else [*first, ("start", False, True), ("wait", False, True)])


def calls(model, world_size):
    """The number of calls, in Python and from it, of a step that is not the first."""
    with simulated(world_size):
        optimizer = lamb(sharded(narrowed(model), MESHES["FSDP2"](world_size), "cpu"))
        optimizer.step(), optimizer.step()
        count = 0

        def see(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(see)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
    return count


def test_the_work_of_the_host_does_not_grow_with_the_number_of_ranks():
    assert calls(TINY, 4096) == pytest.approx(calls(TINY, 64), rel=0.02)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda depth: gpt(64, depth), id="GPT"),
        pytest.param(lambda depth: resnet((depth, depth)), id="ResNet", marks=pytest.mark.slow),
    ],
)
def test_the_work_of_the_host_grows_no_faster_than_the_number_of_layers(model):
    few, more, many = (calls(model(depth), 64) for depth in (3, 6, 12))
    assert many - more < 2.1 * (more - few)


def test_the_memory_of_the_bookkeeping_does_not_grow_with_the_number_of_ranks():
    (_, few), (_, many) = (host(TINY, "FSDP2", world_size, rounds=1) for world_size in (64, 4096))
    assert many < 1.1 * few


@pytest.mark.parametrize(("mesh", "groups"), [("FSDP2", 1), ("FSDP2 x TP", 2)])
def test_the_first_step_lists_the_ranks_of_each_process_group_once(mesh, groups):
    with simulated(512):
        net = sharded(TINY, MESHES[mesh](512), "meta")
        with patch.object(shards, "_ranks", side_effect=shards._ranks) as listed:
            lamb(net).step()
    assert listed.call_count == groups


def test_a_step_on_the_meta_device_has_the_state_and_the_ratios_of_a_real_one():
    with simulated(64):
        optimizers = [lamb(sharded(TINY, MESHES["FSDP2"](64), device)) for device in ("meta", "cpu")]
        for optimizer in optimizers:
            optimizer.step()
        tried, real = optimizers
        for p, q in zip(tried.state, real.state, strict=True):
            assert p.is_meta
            kinds = [
                {key: (value.shape, value.dtype) for key, value in optimizer.state[of].items()}
                for optimizer, of in ((tried, p), (real, q))
            ]
            assert kinds[0] == kinds[1]
        ratios = tried.trust_ratios()
        assert list(ratios) == list(real.trust_ratios())
        assert all(ratio.is_meta and ratio.dtype == torch.float32 for ratio in ratios.values())


def test_the_latency_counts_every_hop():
    assert latency(TREE, 8) == pytest.approx(4.4 + 14 * 0.936)
    assert latency(TREE, 1024) == pytest.approx(4.4 + 14 * 0.936 + 14 * 5.0)
    assert latency(RING, 1024) == pytest.approx(3.6 + 2 * 896 * 0.846 + 254 * 2.7)


def test_ranks_compare_their_layers_where_the_package_is_not_installed():
    with (
        simulated(8),
        patch("lightning_lars.sharding.agreement.version", side_effect=PackageNotFoundError) as looked_up,
    ):
        optimizer = lamb(sharded(narrowed(TINY), MESHES["FSDP2"](8), "cpu"))
        optimizer.step()
    assert looked_up.called
    assert len(optimizer.trust_ratios()) == ADAPTED
