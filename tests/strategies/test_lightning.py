"""Lightning's strategies and precisions match one device, with every callback, and resume."""

import csv
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from lightning_lars import param_groups
from tests.support.ranks import on_ranks, once
from tests.support.small_network import RESUMED, STEPS, batches, deviation, floats, loss_of, network, values
from tests.workers.lightning_strategies import (
    BASE_BATCH_SIZE,
    BATCH_SIZE,
    INITIAL_SCALE,
    OPTIMIZERS,
    RUNS,
    WARMUP_STEPS,
    Module,
    Used,
    fit,
    train,
)

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-6
# The optimizer does not see the strategy's name: the two strategies that differ most have both.
OF_ONE = {
    "zero": "LAMB",
    "fsdp": "LARS",
    "fsdp2 full": "LAMB",
    "tensor parallel": "LARS",
    "fsdp2 tensor parallel": "LARS",
    "ddp 64-true": "LAMB",
    "ddp bf16-mixed": "LAMB",
    "ddp bf16-true": "LARS",
    "ddp 16-mixed": "LAMB",
    "fsdp2 bf16-mixed": "LARS",
    "fsdp2 bf16-true": "LAMB",
}
ALL = [(name, of) for name in ("ddp", "fsdp2") for of in OPTIMIZERS] + list(OF_ONE.items())
PLAIN = [run for run in ALL if "16" not in run[0]]
HALF = [run for run in ALL if "16" in run[0]]


def over(runs):
    return pytest.mark.parametrize(("name", "of"), runs, ids=[f"{name}-{of}" for name, of in runs])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def trained(folder):
    """What each rank sees in a run."""
    return once(lambda name, of: on_ranks(RUNS[name][0], train, folder, name, of))


@pytest.fixture
def seen(trained, name, of):
    """What each rank saw."""
    return trained(name, of)


@cache
def expected(of, dtype=torch.float32, skipped=(False,) * STEPS):
    """Parameters and trust ratios after every step of a loop without Lightning."""
    net = network().to(dtype)
    optimizer = OPTIMIZERS[of](param_groups(net))
    base_lr = optimizer.param_groups[0]["lr"]
    t, steps = 0, []
    for batch, skips in zip(batches().to(dtype), skipped, strict=True):
        if not skips:
            t += 1
            for group in optimizer.param_groups:
                group["lr"] = base_lr * BATCH_SIZE / BASE_BATCH_SIZE * min(1, t / WARMUP_STEPS)
            optimizer.zero_grad()
            loss_of(net(batch)).backward()
            optimizer.step()
        steps.append((values(net), floats(optimizer.trust_ratios())))
    return steps


def without_prefix(parameters):
    return {name.removeprefix("net."): value for name, value in parameters.items()}


def dtype_of(name):
    return torch.float64 if "64" in name else torch.float32


def test_the_table_has_every_run():
    page = Path(__file__).parents[2] / "docs" / "strategies.md"
    table = page.read_text().partition("## Through Lightning")[2].partition("\n## ")[0]
    # A row of another file names its test.
    documented = re.findall(r"^\|.*\| `(?!test_)([^`]+)` \|$", table, re.MULTILINE)
    assert sorted(documented) == sorted(RUNS) == sorted({name for name, _ in ALL})


@over(PLAIN)
def test_parameters_match_one_device_after_every_step(seen, name, of):
    for process in seen:
        assert len(process["values"]) == STEPS
        for actual, (whole, _) in zip(process["values"], expected(of, dtype_of(name)), strict=True):
            assert deviation(without_prefix(actual), whole) < (1e-14 if "64" in name else TOLERANCE)


@over(PLAIN)
def test_a_resumed_run_matches_an_uninterrupted_one(seen):
    for process in seen:
        assert len(process["resumed"]) == STEPS - RESUMED
        for again, straight in zip(process["resumed"], process["values"][RESUMED:], strict=True):
            assert deviation(again, straight) < TOLERANCE


@pytest.mark.filterwarnings("ignore:LAMB moves excluded parameters")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@over([run for run in PLAIN if run[0] in ("ddp", "zero", "fsdp2 full")])
def test_full_checkpoint_resumes_on_one_device(seen, folder, tmp_path, name, of):
    checkpoint = folder / f"{name} {of}" / "steps" / f"step={RESUMED}.ckpt"
    module_class = Used if "fsdp2" in name else Module
    here = fit(tmp_path, module_class, OPTIMIZERS[of], "auto", {}, checkpoint=checkpoint, devices=1)
    for actual, (whole, _) in zip(here["values"], expected(of)[RESUMED:], strict=True):
        assert deviation(without_prefix(actual), whole) < TOLERANCE


@over([run for run in PLAIN if run[0] != "zero"])
def test_the_monitor_logs_whole_layers_by_their_plain_names(seen, folder, name, of):
    ratios = {f"net.{layer}": ratio for layer, ratio in expected(of, dtype_of(name))[-1][1].items()}
    for process in seen:
        assert process["ratios"] == pytest.approx(ratios, rel=1e-5)
        assert process["logged"]["trust_ratio/max"] == pytest.approx(max(ratios.values()), rel=1e-5)
        before, after = (of_step for of_step, _ in expected(of, dtype_of(name))[-2:])
        updates = [
            ((after[layer] - before[layer]).norm() / after[layer].norm()).item()
            for layer in expected(of, dtype_of(name))[-1][1]
        ]
        assert process["logged"]["update_to_weight/max"] == pytest.approx(max(updates), rel=1e-4)
        assert process["logged"]["update_to_weight/min"] == pytest.approx(min(updates), rel=1e-4)
    with (folder / f"{name} {of}" / "logs" / "version_0" / "metrics.csv").open() as file:
        logged = [float(row["trust_ratio/max"]) for row in csv.DictReader(file) if row["trust_ratio/max"]]
    largest = [max(of_step.values()) for _, of_step in expected(of, dtype_of(name))]
    assert logged == pytest.approx(largest, rel=1e-5)


@over(ALL)
def test_schedules_see_the_plain_learning_rate(seen, of):
    base_lr = OPTIMIZERS[of].keywords["lr"]
    for process in seen:
        assert process["rates"] == [[base_lr, base_lr]] * STEPS


def skipped_steps(process):
    """Which steps the gradient scaler left out."""
    if process["scales"][0] is None:
        return (False,) * STEPS
    before = [INITIAL_SCALE, *process["scales"]]
    return tuple(after < scale for scale, after in zip(before, process["scales"], strict=False))


@over(HALF)
def test_half_precision_follows_float32_within_its_rounding(seen, of):
    skipped = skipped_steps(seen[0])
    start = values(network())
    for number, (whole, _) in enumerate(expected(of, skipped=skipped)):
        first = seen[0]["values"][number]
        if all(skipped[: number + 1]):
            assert deviation(without_prefix(first), start) == 0
        else:
            actual = {key: p.float() for key, p in without_prefix(first).items()}
            assert deviation(actual, whole) < 0.1 * deviation(whole, start)
        for other in seen[1:]:
            assert deviation(other["values"][number], first) == 0


@over([run for run in HALF if run[0] == "ddp 16-mixed"])
def test_some_steps_overflow(seen):
    assert skipped_steps(seen[0])[0]
    assert not skipped_steps(seen[0])[-1]
