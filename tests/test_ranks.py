"""Functions on several ranks; if one raises, dies or hangs, the error says where; later ones still run."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.ranks import RankError, on_ranks, once
from tests.workers import misbehaving

pytestmark = pytest.mark.distributed


def error_of(function, *arguments, limit=60.0):
    """What is said of a function that fails, after which all its processes are gone and others run."""
    with pytest.raises(RankError) as raised:
        on_ranks(2, function, *arguments, limit=limit)
    assert multiprocessing.active_children() == []
    assert on_ranks(2, misbehaving.add_up, 1) == [(0, 3.0), (1, 3.0)]
    return str(raised.value)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_returns_its_own_result(world_size):
    total = world_size * 10.0 + sum(range(world_size))
    expected = [(rank, total) for rank in range(world_size)]
    assert on_ranks(world_size, misbehaving.add_up, 10) == expected


def test_concurrent_calls_are_independent():
    with ThreadPoolExecutor(3) as threads:
        numbers = range(3)
        results = threads.map(lambda number: on_ranks(2, misbehaving.add_up, number), numbers)
        assert list(results) == [[(0, 2.0 * number + 1), (1, 2.0 * number + 1)] for number in numbers]


def test_a_rank_that_raises_fails_with_its_traceback_and_what_it_printed():
    message = error_of(misbehaving.fail, 1)
    assert "Rank 1 raised\nTraceback (most recent call last):" in message
    assert 'raise ValueError("a wrong value")' in message
    assert message.count("about to fail") == 2


def test_the_others_do_not_wait_long_for_a_rank_that_raised():
    message = error_of(misbehaving.fail, 1)
    assert "Rank 0 was not done" in message
    assert "in barrier" in message


def test_a_rank_that_hangs_fails_with_the_traceback_of_every_rank():
    message = error_of(misbehaving.hang, 0, limit=1.0)
    first, second = message.split("Rank 1 ")
    assert "Rank 0 was not done" in first
    assert "in sleep_forever" in first
    assert "in hang" in first
    assert "going to bed" in first
    assert "was not done" in second
    assert "in barrier" in second


def test_a_rank_that_ends_early_fails_with_its_exit_code_and_what_it_printed():
    message = error_of(misbehaving.exit_early, 1)
    assert "Rank 1 died with exit code 3. It printed:\nleaving" in message


def test_a_rank_that_crashes_fails_with_its_traceback():
    message = error_of(misbehaving.crash, 0)
    assert "Rank 0 died with exit code -11" in message
    assert "Segmentation fault" in message
    assert "in crash" in message


def test_a_result_that_cannot_be_sent_fails():
    assert "Can't pickle" in error_of(misbehaving.return_what_cannot_be_sent)


def test_no_call_finds_leftovers_of_an_earlier_one():
    first, second = (on_ranks(2, misbehaving.leave_traces) for _ in range(2))
    assert first == second
    assert first[0]["environment"] is None
    assert (first[0]["dtype"], first[0]["threads"], first[0]["deterministic"]) == ("torch.float32", 1, False)


def test_ranks_are_forked_from_a_process_with_one_thread():
    assert on_ranks(1, misbehaving.threads_of_the_server) == [1]


def test_cached_calls_return_or_raise_the_same_again():
    calls = []

    @once
    def half(number):
        calls.append(number)
        return calls if number % 2 == 0 else 1 / 0

    assert half(2) is half(2)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            half(3)
    assert calls == [2, 3]
