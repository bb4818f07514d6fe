"""Ranks with other layers, another order or other versions raise before anything is exchanged or moved."""

import pytest

from tests.support.ranks import on_ranks, once
from tests.workers import disagreeing

pytestmark = pytest.mark.distributed

FIRST = "where rank 0 has 'enter.weight' of shape (5, 5)"
THEIRS = {
    "order": f"rank 1 has 'head.bias' of shape (3,) {FIRST}",
    "fewer": "rank 1 has no further layer where rank 0 has 'head.bias' of shape (3,)",
    "names": f"rank 1 has 'my_enter.weight' of shape (5, 5) {FIRST}",
    "excluded": "rank 1 has no further layer where rank 0 has 'one.norm.weight' of shape (5,)",
    "versions": "rank 1 has lightning-lars 9.9 where rank 0 has lightning-lars 1.0",
}


@once
def seen_of(ranks, setup, changes):
    return on_ranks(ranks, disagreeing.first_steps, changes, setup)


@pytest.mark.parametrize("change", THEIRS)
def test_ranks_that_disagree_all_raise_before_a_step(change):
    for process in seen_of(2, "fsdp2", ("nothing", *THEIRS)):
        message, is_unmoved, states = process[change]
        assert THEIRS[change] in message
        assert is_unmoved
        assert states == 0


def test_shards_of_fsdp1_are_compared_by_name():
    for process in seen_of(2, "full_shard", ("nothing", "order")):
        message, is_unmoved, _ = process["order"]
        assert "rank 1 has 'head.bias' where rank 0 has 'enter.weight'" in message
        assert is_unmoved


@pytest.mark.parametrize("setup", ["fsdp2", "full_shard"])
def test_ranks_that_agree_take_their_step(setup):
    changes = ("nothing", *THEIRS) if setup == "fsdp2" else ("nothing", "order")
    for process in seen_of(2, setup, changes):
        message, is_unmoved, states = process["nothing"]
        assert message is None
        assert not is_unmoved
        assert states > 0


def test_every_rank_of_a_mesh_of_two_dimensions_raises_and_waits_for_no_other():
    ends = [process["order"] for process in seen_of(4, "fsdp2_tensor_parallel", ("order",))]
    assert all(is_unmoved for _, is_unmoved, _ in ends)
    messages = [message for message, _, _ in ends]
    assert "a rank that shares no process group with this one" in messages[0]
    assert "rank 3 has" in messages[1]
    assert "rank 3 has" in messages[2]
    assert "rank 3 has" in messages[3]
