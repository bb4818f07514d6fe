"""Advice as numbers, as JSON and as tables."""

import json
import math
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from lightning_lars import recipes
from lightning_lars.advice.batch_sizes import batch_sizes, steps_factor, suggested_multiple
from lightning_lars.advice.report import Advice, CriticalBatchSize, ParameterGroup
from lightning_lars.advice.unknown import of_run

CRITICAL = CriticalBatchSize(400.0, 31.0, 800.0, 2.0, 256, ((10, None), (20, 390.0), (30, 400.0)))
ADVICE = Advice(
    optimizer="SGD",
    batch_size=128,
    base_batch_size=128,
    measured_steps=300,
    steps=1000,
    critical=CRITICAL,
    suggested_batch_size=512,
    batch_sizes=batch_sizes(128, 128, 0.4, 1000, 400.0, is_linear=True),
    groups=(
        ParameterGroup("adapted", 4, 6216, 0.4, 5e-4, None),
        ParameterGroup("(frozen)", 1, 2, *[None] * 3),
    ),
    parameter_bytes=24864,
    state_bytes={"SGD": 24864, "LAMB8bit": 2**21},
    unusual=("SGD [decays] everything.",),
    unknown=("Much.",),
)
NOT_MEASURED = replace(
    ADVICE,
    measured_steps=0,
    critical=None,
    suggested_batch_size=None,
    batch_sizes=batch_sizes(128, 128, None, None, None, is_linear=False),
)


def run(**changes):
    arguments = {"measured_steps": 300, "max_steps": 300, "batch_size": 256}
    arguments |= {"is_in_warmup": False, "is_distributed": False}
    return of_run(changes.pop("critical", CRITICAL), **{**arguments, **changes})


@pytest.mark.parametrize("critical", [3.0, 200.0, 50_000.0])
def test_steps_and_samples_lie_on_the_hyperbola_of_the_paper(critical):
    # (steps / fewest steps - 1) * (samples / fewest samples - 1) = 1, with fewest samples = critical * steps.
    fewest_steps = 70.0
    steps_at_base = fewest_steps * (1 + critical / 64)
    for size in (64, 640, 10_000):
        steps = steps_at_base * steps_factor(size, 64, critical)
        samples = steps * size
        assert (steps / fewest_steps - 1) * (samples / (critical * fewest_steps) - 1) == pytest.approx(1.0)


@pytest.mark.parametrize("critical", [0.5, 90.0, 100.0, 182.0, 10_000.0])
def test_the_suggested_batch_size_is_the_closest_to_the_critical_one(critical):
    distances = {k: abs(math.log2(critical / (64 * 2**k))) for k in range(12)}
    assert suggested_multiple(64, critical) == 2 ** min(distances, key=distances.get)


def test_the_rows_go_to_twice_the_suggested_batch_size_with_rates_by_rule():
    rows = batch_sizes(8, 16, 0.1, None, 8 * 61.0, is_linear=True)
    assert [row.batch_size for row in rows] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert [row.batch_size for row in batch_sizes(8, 8, 0.1, None, 1.0, is_linear=True)][-1] == 128
    for row in rows:
        assert row.lr_sqrt == pytest.approx(0.1 * math.sqrt(row.batch_size / 16))
        assert row.lr_linear == pytest.approx(0.1 * row.batch_size / 16)
        assert row.samples_factor == pytest.approx(row.steps_factor * row.batch_size / 8)
        assert (row.steps, row.samples) == (None, None)
        for point, recipe in ((row.lars, recipes.lars), (row.lamb, recipes.lamb)):
            arguments = recipe(row.batch_size)
            made = arguments["optimizer"]([{"params": []}]).defaults
            assert (point.lr, point.weight_decay) == (made["lr"], made["weight_decay"])
            assert point.excluded_lr == arguments["excluded_lr"]


@pytest.mark.parametrize("advice", [ADVICE, NOT_MEASURED])
def test_json_holds_everything_and_comes_back_equal(advice):
    text = advice.to_json()
    assert Advice.from_json(text) == advice
    values = json.loads(text)
    assert list(values) == list(Advice.__dataclass_fields__)
    assert values["batch_sizes"][1]["batch_size"] == 256
    assert (values["critical"] is None) == (advice.critical is None)
    with pytest.raises(TypeError, match="more"):
        Advice.from_json(json.dumps({**values, "more": 1}))


def test_a_rate_that_is_not_finite_is_null_in_json_and_printed():
    sizes = batch_sizes(128, 128, math.inf, 1000, 400.0, is_linear=True)
    groups = (ParameterGroup("adapted", 4, 6216, math.inf, math.nan, None),)
    advice = replace(ADVICE, groups=groups, batch_sizes=sizes)
    back = Advice.from_json(advice.to_json())
    assert (back.groups[0].lr, back.groups[0].weight_decay, back.batch_sizes[0].lr_sqrt) == (None, None, None)
    assert (back.batch_sizes[0].lars, back.critical) == (advice.batch_sizes[0].lars, advice.critical)
    assert "inf" in printed(advice)
    assert "adapted" in printed(back)


def printed(advice):
    console = Console(file=StringIO(), width=70)
    advice.print(console)
    return console.file.getvalue()


def test_the_tables_show_the_numbers():
    text = printed(ADVICE)
    assert "about 400 ± 31 samples, from 300 steps. Batch size to try: 512." in " ".join(text.split())
    row = next(line for line in text.splitlines() if "512" in line and "│" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "512",
        "432 (0.43x)",  # (1 + 400 / 512) / (1 + 400 / 128) of 1000
        "221,184 (1.73x)",
        "0.8",
        "1.6",
        "12",
        "0.05",
        "0.015",
        "0.01",
    ]
    for cells in (("adapted", "4", "6,216", "-", "0.0005", "0.4"), ("SGD (measured)", "24.3 KiB", "1.00")):
        assert any(all(f" {cell} " in line for cell in cells) for line in text.splitlines())
    assert "LAMB8bit" in text
    assert "2.0 MiB" in text
    assert "- SGD [decays] everything." in text
    assert "- Much." in text


def test_the_tables_leave_out_what_was_not_measured():
    text = printed(NOT_MEASURED)
    assert "Critical batch size: unknown." in text
    for left_out in ("Samples", "linear", "(measured)", "None", "nan"):
        assert left_out not in text


def test_where_the_batch_size_is_critical_the_headline_says_what_twice_of_it_costs():
    small = replace(
        ADVICE, suggested_batch_size=128, batch_sizes=batch_sizes(128, 128, 1.0, None, 100.0, is_linear=False)
    )
    text = " ".join(printed(small).split())
    assert "Twice the batch size, 256, would take 78% of the steps and 156% of the samples." in text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"measured_steps": 30}, "The run ended after 30 of 300 steps."),
        ({"measured_steps": 30, "max_steps": 30}, "30 steps: few"),
        ({"critical": replace(CRITICAL, standard_error=101.0)}, "The error of the noise scale is large"),
        ({"critical": replace(CRITICAL, standard_error=None)}, "The error of the noise scale is large"),
        (
            {"critical": replace(CRITICAL, history=((10, 90.0), (20, 310.0), (30, 400.0)))},
            "The noise scale was still changing, from 310 to 400",
        ),
        (
            {"critical": replace(CRITICAL, b_simple=None, squared_gradient=-1.0)},
            "The gradient is lost in the noise",
        ),
        (
            {"critical": replace(CRITICAL, b_simple=None, tr_sigma=-1.0)},
            "The noise is lost in the gradient",
        ),
        (
            {"batch_size": 128},
            "measured at an effective batch size of 256 by accumulation",
        ),
        ({"is_in_warmup": True}, "The learning rate had not reached its peak"),
        ({"is_distributed": True}, "that of one rank"),
        ({"begin": 500}, "is that of those from step 500 on"),
    ],
)
def test_says_what_a_run_leaves_unknown(changes, told):
    new = [sentence for sentence in run(**changes) if sentence not in run()]
    assert any(told in sentence for sentence in new) if told else not new
    assert all(sentence.endswith(".") for sentence in run(**changes))


def test_nothing_is_said_of_a_noise_scale_that_was_not_measured():
    assert any("The noise scale is that of the first steps" in sentence for sentence in run())
    assert not any("The noise scale is" in sentence for sentence in run(critical=None))
