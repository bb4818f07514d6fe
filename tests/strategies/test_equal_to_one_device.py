"""Every strategy matches one device: parameters, trust ratios, checkpoints; and the number of all-reduces."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from lightning_lars import LAMB, LARS
from tests.support.ranks import on_ranks, once
from tests.support.releases import has
from tests.support.setups import ON_FOUR, SETUPS, Setup, alone
from tests.support.slow import slow_unless
from tests.support.small_network import CASES, STEPS, batches, deviation, network, trained
from tests.workers import edges, equal_to_one_device
from tests.workers.equal_to_one_device import go_on, state_on_one_device, step

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-6
ALL = [f"{name}-2" for name in SETUPS if name not in ON_FOUR] + [f"{name}-4" for name in ("fsdp2", *ON_FOUR)]
WHOLE = "ddp-2", "ddp_zero-2", "no_shard-2"
# A strategy changes norms, and an option what is done with norms of whole layers: every set-up has two cases,
# and every case two set-ups, in one of which gradients must be added up first.
CASES_OF_ALL = ["LARS nesterov", "LAMB clipping"]
HAVE_ALL_CASES = ["fsdp2-2", "sequence_parallel-2"]
# The optimizer refuses max_grad_norm where each process has some of the layers.
CASES_OF_ZERO = ["LARS nesterov", "LAMB"]
CASES_OF = {
    **dict.fromkeys(ALL, CASES_OF_ALL),
    **{setup: list(CASES) for setup in HAVE_ALL_CASES},
    "ddp_zero-2": CASES_OF_ZERO,
    "full_shard-2": [*CASES_OF_ALL, "NovoGrad"],
}
# What is left to the slow tests: the second case of four ranks, and all cases of a second set-up.
QUICK = {
    **CASES_OF,
    **{setup: ["LAMB clipping"] for setup in ALL if setup.endswith("-4")},
    "sequence_parallel-2": [*CASES_OF_ALL, "NovoGrad"],
}
RUNS = [(setup, case) for setup in ALL for case in CASES_OF[setup]]
# The state of LAMB has all that of LARS has, and more. Lightning gathers that of ZeroRedundancyOptimizer.
RESUMED = [(setup, "LAMB clipping") for setup in ALL if setup != "ddp_zero-2"]
RESUMED += [("full_shard-2", "LARS nesterov"), ("fsdp2-2", "LARS nesterov")]
# NovoGrad has a number of each layer beside, which all ranks hold.
RESUMED += [("full_shard-2", "NovoGrad"), ("fsdp2-2", "NovoGrad")]
# Two kinds of meshes with replicas too, which share checkpoints as they would without replicas, resume only
# in the slow tests.
RESUMED_SLOWLY = ["hsdp-4", "hybrid_shard-4"]
# With parts of some layers on some processes only, and gradients that must be added up first.
IN_TRITON = [("full_shard-2", "LARS nesterov"), ("sequence_parallel-2", "LAMB clipping")]
IN_TRITON += [("full_shard-2", "NovoGrad"), ("fsdp2-4", "LARS nesterov")]

# What the table says: without and with max_grad_norm.
EXCHANGES = {
    setup: (int(row[3]), int(row[4] or 0))
    for row in re.finditer(
        r"^\|([^|]*)\|([^|]*)\| (\d+)(?: \((\d+)\))?[^|]*\|[^|]*\|([^|]*)\|$", PAGE.read_text(), re.MULTILINE
    )
    for setup in re.findall(r"`(\w+-\d)`", row[5])
}


def over(runs, left_out=()):
    runs = [slow_unless(case in QUICK[setup] and setup not in left_out, setup, case) for setup, case in runs]
    return pytest.mark.parametrize(("setup", "case"), runs, ids=lambda value: value.replace(" ", "_"))


over_resumed = over(RESUMED, left_out=RESUMED_SLOWLY)


@once
def seen_of(setup, cases, resumes):
    name, ranks = setup.split("-")
    resumed = [case for case in cases if resumes and (setup, case) in RESUMED]
    in_triton = [case for case in cases if (setup, case) in IN_TRITON and has("triton>=3.3")]
    with_local_norms = CASES_OF_ALL[:1] if cases == tuple(QUICK[setup]) else []
    return on_ranks(
        int(ranks), equal_to_one_device.train_all, name, cases, resumed, in_triton, with_local_norms
    )


def seen(setup, case, way="here", resumes=False):
    """What each process of a set-up saw, which trains all quick cases one after the other."""
    is_slow = case not in QUICK[setup] and way != "with local norms"
    is_alone = is_slow or (resumes and setup in RESUMED_SLOWLY)
    cases = (case,) if is_alone else tuple(QUICK[setup])
    ends = seen_of(setup, cases, is_alone or setup not in RESUMED_SLOWLY)
    return [process[way][case] for process in ends]


@cache
def expected(case):
    return list(trained(case))


def test_the_table_has_every_setup():
    assert sorted(EXCHANGES) == sorted(ALL)


@over(RUNS)
def test_parameters_match_one_device_after_every_step(setup, case):
    for process in seen(setup, case):
        assert len(process["values"]) == STEPS
        for actual, (values, _) in zip(process["values"], expected(case), strict=True):
            assert deviation(actual, values) < TOLERANCE


# With ZeroRedundancyOptimizer each process steps some of the layers.
@over([(setup, case) for setup, case in RUNS if setup != "ddp_zero-2"])
def test_every_rank_knows_the_trust_ratio_of_every_layer(setup, case):
    for process in seen(setup, case):
        for actual, (_, ratios) in zip(process["ratios"], expected(case), strict=True):
            assert list(actual) == list(ratios)
            assert actual == pytest.approx(ratios, rel=1e-5)
        assert process["dtypes"] == {torch.float32}


@over(RUNS)
def test_a_step_all_reduces_as_often_as_documented(setup, case):
    exchanges = EXCHANGES[setup]["max_grad_norm" in CASES[case][1]]
    process_groups = EXCHANGES[setup][0]
    for process in seen(setup, case):
        for number, collectives in enumerate(process["collectives"]):
            # The gradients of norms under sequence parallelism are sums that nobody has added up yet.
            added_up = 4 if setup == "sequence_parallel-2" else 0
            # Before the first exchange, all ranks of a process group compare their layers.
            compared = process_groups if number == 0 else 0
            expected = {"c10d.allreduce_": exchanges + compared, "c10d_functional.all_reduce": added_up}
            if setup == "ddp_zero-2":
                # Who steps a parameter tells the others.
                expected["c10d.broadcast_"] = collectives["c10d.broadcast_"]
            assert collectives == {name: count for name, count in expected.items() if count}


@pytest.mark.parametrize("setup", ALL)
def test_the_comparison_fails_with_norms_of_local_shards(setup):
    case = CASES_OF_ALL[0]
    ends = seen(setup, case, "with local norms")
    wrong = max(deviation(end, expected(case)[1][0]) for end in ends)
    if setup in WHOLE:
        assert wrong < TOLERANCE
    else:
        assert wrong > 100 * TOLERANCE


@over(IN_TRITON)
def test_the_triton_kernel_takes_the_same_steps_of_shards(setup, case):
    pytest.importorskip("triton", minversion="3.3", reason="there is no triton for this system")
    for process in seen(setup, case, "in Triton"):
        steps = zip(process["values"], process["ratios"], expected(case)[:2], strict=True)
        for actual, ratios, (values, expected_ratios) in steps:
            assert deviation(actual, values) < TOLERANCE
            assert ratios == pytest.approx(expected_ratios, rel=1e-5)


@over_resumed
@pytest.mark.parametrize("checkpoint", ["from shards", "from one device"])
def test_a_resumed_run_matches_an_uninterrupted_one(setup, case, checkpoint):
    for process in seen(setup, case, resumes=True):
        assert deviation(process[checkpoint], expected(case)[-1][0]) < TOLERANCE


@over_resumed
def test_full_checkpoint_equals_that_of_one_device(setup, case):
    """Then whatever goes on from one of them goes on from the other."""
    model_here, here = state_on_one_device(case)
    for process in seen(setup, case, resumes=True):
        model, optimizer = process["full"]
        assert deviation(model, model_here) < TOLERANCE
        assert optimizer["param_groups"] == here["param_groups"]
        assert optimizer["state"].keys() == here["state"].keys()
        for layer, state in here["state"].items():
            assert {type(value) for value in optimizer["state"][layer].values()} == {torch.Tensor}
            torch.testing.assert_close(optimizer["state"][layer], state, rtol=0.0, atol=TOLERANCE)


@over_resumed
def test_full_checkpoint_resumes_on_one_device(setup, case):
    end = go_on(alone(case), seen(setup, case, resumes=True)[0]["full"], full=True)
    assert deviation(end, expected(case)[-1][0]) < TOLERANCE


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_a_layer_has_its_whole_weight_where_only_one_rank_has_a_gradient(optimizer_class):
    with_gradient, without = on_ranks(2, edges.gradient_on_one_process, optimizer_class)
    assert with_gradient == pytest.approx(edges.gradient_of_one_half(optimizer_class), rel=1e-6)
    assert without == {}


def test_an_optimizer_notices_that_fsdp_wraps_its_layers_after_the_first_steps():
    net = network()
    here = Setup(net, net, LARS(net.parameters(), lr=0.2, momentum=0.0, trust_coefficient=0.1), 0, 1)
    for batch in batches():
        step(here, batch)
    for end in on_ranks(2, edges.wrapped_late):
        assert deviation(end, here.values()) < TOLERANCE
