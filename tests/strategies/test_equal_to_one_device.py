"""Every strategy takes the steps of one device: parameters, trust ratios, checkpoints; and its exchanges."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

from lightning_lars import LAMB, LARS
from tests.support.setups import ON_FOUR, ON_TWO, Setup, alone, ddp, ddp_zero, no_shard, sequence_parallel
from tests.support.small_network import CASES, RESUMED, STEPS, batches, deviation, network, trained
from tests.workers.edges import gradient_of_one_half
from tests.workers.equal_to_one_device import IN_TRITON, IN_TRITON_CASES, RESUMED_CASES, step

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-6
SETUPS = [(make, 2) for make in ON_TWO] + [(make, 4) for make in ON_FOUR]
WHOLE = ddp, ddp_zero, no_shard

# What the table says: without and with max_grad_norm.
EXCHANGES = {
    setup: (int(row[3]), int(row[4] or 0))
    for row in re.finditer(
        r"^\|([^|]*)\|([^|]*)\| (\d+)(?: \((\d+)\))?[^|]*\|[^|]*\|([^|]*)\|$", PAGE.read_text(), re.MULTILINE
    )
    for setup in re.findall(r"`(\w+-\d)`", row[5])
}


def over(setups):
    ids = [f"{make.__name__}-{processes}" for make, processes in setups]
    return pytest.mark.parametrize(("make", "processes"), setups, ids=ids)


setups = over(SETUPS)
cases = pytest.mark.parametrize("case", CASES)
resumed_cases = pytest.mark.parametrize("case", RESUMED_CASES)


@cache
def run(folder, processes):
    """Train in every set-up of so many processes, once."""
    return subprocess.run(
        [sys.executable, "-m", "tests.workers.equal_to_one_device", folder, str(processes)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture
def seen(folder, make, processes, case):
    """What each process saw."""
    if make is ddp_zero and "max_grad_norm" in CASES[case][1]:
        pytest.skip("max_grad_norm is refused where each process has some of the layers")
    finished = run(str(folder), processes)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    paths = [folder / f"{make.__name__} {processes} {rank}.pt" for rank in range(processes)]
    return [torch.load(path, weights_only=False)[case] for path in paths]


@cache
def expected(case):
    return list(trained(case))


def test_the_table_has_every_setup():
    assert sorted(EXCHANGES) == sorted(f"{make.__name__}-{processes}" for make, processes in SETUPS)


@setups
@cases
def test_the_parameters_are_those_of_one_device_after_every_step(seen, case):
    for process in seen:
        assert len(process["values"]) == STEPS
        for actual, (values, _) in zip(process["values"], expected(case), strict=True):
            assert deviation(actual, values) < TOLERANCE


@setups
@cases
def test_every_process_knows_the_trust_ratio_of_every_layer(seen, case, make):
    if make is ddp_zero:
        pytest.skip("each process steps some of the layers")
    for process in seen:
        for actual, (_, ratios) in zip(process["ratios"], expected(case), strict=True):
            assert list(actual) == list(ratios)
            assert actual == pytest.approx(ratios, rel=1e-5)
        assert process["dtypes"] == {torch.float32}


@over(IN_TRITON)
@pytest.mark.parametrize("case", IN_TRITON_CASES)
def test_the_kernels_for_gpus_take_the_same_steps_of_shards(seen, case):
    pytest.importorskip("triton", reason="there is no triton for this system")
    for process in seen:
        in_triton = process["in triton"]
        steps = zip(in_triton["values"], in_triton["ratios"], expected(case), strict=True)
        for actual, ratios, (values, expected_ratios) in steps:
            assert deviation(actual, values) < TOLERANCE
            assert ratios == pytest.approx(expected_ratios, rel=1e-5)


@setups
@cases
def test_norms_of_shards_would_have_been_noticed(seen, case, make):
    final = expected(case)[-1][0]
    wrong = max(deviation(process["local norms"], final) for process in seen)
    if make in WHOLE:
        assert wrong < TOLERANCE
    else:
        assert wrong > 100 * TOLERANCE


@setups
@cases
def test_a_step_exchanges_as_often_as_the_documentation_says(seen, case, make, processes):
    exchanges = EXCHANGES[f"{make.__name__}-{processes}"]["max_grad_norm" in CASES[case][1]]
    for process in seen:
        for collectives in process["collectives"]:
            # The gradients of norms under sequence parallelism are sums that nobody has added up yet.
            added_up = 4 if make is sequence_parallel else 0
            expected = {"c10d.allreduce_": exchanges, "c10d_functional.all_reduce": added_up}
            if make is ddp_zero:
                # Who steps a parameter tells the others.
                expected["c10d.broadcast_"] = collectives["c10d.broadcast_"]
            assert collectives == {name: count for name, count in expected.items() if count}


@setups
@resumed_cases
@pytest.mark.parametrize("kind", ["full", "sharded", "of another"])
def test_a_resumed_run_goes_on_like_an_uninterrupted_one(seen, case, make, kind):
    if make is ddp_zero:
        pytest.skip("its state is gathered by consolidate_state_dict, as Lightning does")
    if kind == "of another" and make in (ON_TWO[0], ON_FOUR[0]):
        pytest.skip("no strategy before it left a checkpoint")
    for process in seen:
        uninterrupted = expected(case)[-1][0] if kind == "of another" else process["values"][-1]
        assert deviation(process["resumed"][kind], uninterrupted) < TOLERANCE


@setups
@resumed_cases
def test_a_full_checkpoint_goes_on_on_one_device(seen, case, make):
    if make is ddp_zero:
        pytest.skip("its state is gathered by consolidate_state_dict, as Lightning does")
    here = alone(case)
    model, optimizer = seen[0]["full"]
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_state_dict(
        here.net, here.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options
    )
    for batch in batches()[RESUMED:]:
        step(here, batch)
    assert deviation(here.values(), expected(case)[-1][0]) < TOLERANCE


@pytest.fixture
def edges(folder):
    """What each of two processes saw besides."""
    finished = run(str(folder), 2)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return [torch.load(folder / f"edges {rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_a_layer_has_its_whole_weight_where_one_process_alone_has_a_gradient(edges, optimizer_class):
    with_gradient, without = (
        process["gradient on one process"][optimizer_class.__name__] for process in edges
    )
    assert with_gradient == pytest.approx(gradient_of_one_half(optimizer_class), rel=1e-6)
    assert without == {}


def test_an_optimizer_notices_that_fsdp_wraps_its_layers_after_the_first_steps(edges):
    net = network()
    here = Setup(net, net, LARS(net.parameters(), lr=0.2, momentum=0.0, trust_coefficient=0.1), 0, 1)
    for batch in batches():
        step(here, batch)
    for process in edges:
        assert deviation(process["wrapped late"], here.values()) < TOLERANCE
