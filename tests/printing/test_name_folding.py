"""Folding of the names of repeated blocks."""

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lars.printing.name_folding import fold


def unfolded(name):
    """All names that a folded name stands for."""
    choices = []
    for part in re.split(r"(\[.*?\]|\{.*?\})", name):
        if part.startswith("["):
            ends = [run.split("-") for run in part[1:-1].split(",")]
            choices.append([str(n).zfill(len(r[0])) for r in ends for n in range(int(r[0]), int(r[-1]) + 1)])
        else:
            choices.append(part[1:-1].split(",") if part.startswith("{") else [part])
    return ["".join(each) for each in product(*choices)]


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.weight", "a.bias"], "a.{weight,bias}"),
        (["a.0.w", "a.1.w", "a.2.w"], "a.[0-2].w"),
        (["a.0.w", "a.2.w", "a.3.w", "a.10.w"], "a.[0,2-3,10].w"),
        (["b1.0.w", "b1.1.w", "b2.0.w", "b2.1.w"], "b[1-2].[0-1].w"),
        (["b.08.w", "b.09.w"], "b.[08-09].w"),
        (["rnn.weight_ih_l0", "rnn.weight_ih_l1"], "rnn.weight_ih_l[0-1]"),
    ],
)
def test_differences_are_in_brackets(names, folded):
    assert fold((name, "same") for name in names) == [(folded, len(names), "same")]


@pytest.mark.parametrize(
    "names",
    [
        ["a.weight", "b.weight"],
        ["a.in_weight", "a.in_bias"],
        ["a.0.w", "a.1.v"],
        ["a.0", "a.0.0"],
        ["a0", "a"],
        ["a.1", "a.01"],
    ],
)
def test_other_differences_are_kept_apart(names):
    assert fold((name, "same") for name in names) == [(name, 1, "same") for name in names]


def test_names_with_different_values_are_not_folded():
    assert fold([("a.0", (3,)), ("a.1", (4,))]) == [("a.0", 1, (3,)), ("a.1", 1, (4,))]


def test_a_folded_name_represents_no_missing_name():
    assert fold((name, 1) for name in ["0.0", "0.1", "1.1"]) == [("0.0", 1, 1), ("[0-1].1", 2, 1)]


PART = st.sampled_from(["0", "1", "2", "7", "01", "02", "a", "b1", "weight", "bias"])
NAMES = st.lists(st.lists(PART, min_size=1, max_size=4).map(".".join), unique=True)


@given(NAMES.flatmap(lambda names: st.tuples(st.just(names), st.tuples(*(st.integers(0, 1) for _ in names)))))
def test_a_folded_name_represents_every_name_once(drawn):
    names = list(zip(*drawn, strict=True))
    folded = fold(names)
    assert sorted((each, same) for name, _, same in folded for each in unfolded(name)) == sorted(names)
    assert all(count == len(unfolded(name)) for name, count, _ in folded)


def test_keeps_the_order_of_the_first():
    names = ["z.0", "m.weight", "a.1", "z.1", "m.bias"]
    assert [name for name, _, _ in fold((name, 1) for name in names)] == ["z.[0-1]", "m.{weight,bias}", "a.1"]
