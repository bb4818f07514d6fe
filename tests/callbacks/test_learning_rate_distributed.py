"""Two ranks take the same steps as one with the same effective batch size."""

import pytest

from lightning_lars import BatchSizeScaling, BatchSizeSchedule, LearningRateWarmup
from tests.support.mean import RATE, SIZE, Mean, numbers
from tests.support.ranks import on_ranks
from tests.support.walk import BATCH_SIZE, BATCHES, RATES, Walk, scaled, walk
from tests.workers.batch_size_schedule import BATCH_SIZES, LIMIT
from tests.workers.batch_size_schedule import train as train_with_schedule
from tests.workers.learning_rate import BASE, WARMUP, train

pytestmark = pytest.mark.distributed
REPLICAS = {"ddp": 2, "fsdp2": 2, "tensor parallel": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two_ranks")


@pytest.fixture(scope="module")
def seen(folder):
    """What each of two ranks saw."""
    return on_ranks(2, train, folder)


def close(rates):
    return [pytest.approx(step, rel=1e-12, abs=1e-14) for step in rates]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("strategy", REPLICAS)
def test_the_replicas_multiply_the_batch_and_the_rates(seen, strategy, rank):
    here = seen[rank][strategy]
    steps, scale = BATCHES // REPLICAS[strategy], BATCH_SIZE * REPLICAS[strategy] / BASE
    assert here["size"] == BATCH_SIZE * REPLICAS[strategy]
    expected = scaled([RATES] * steps, [scale * min(1.0, step / WARMUP) for step in range(1, steps + 1)])
    assert here["rates"] == close(expected)


def test_two_ranks_match_one_that_accumulates_two_batches(seen, tmp_path):
    callbacks = LearningRateWarmup(WARMUP), BatchSizeScaling(BASE)
    one = walk(tmp_path, Walk(), *callbacks, accumulate_grad_batches=2, max_epochs=1)
    assert seen[0]["ddp"]["path"] == close(one.path[::2])


@pytest.mark.usefixtures("seen")
def test_one_rank_continues_from_two_and_rescales(folder, tmp_path):
    warmup, steps = LearningRateWarmup(BATCHES), BATCHES // 2
    module = walk(tmp_path, Walk(), warmup, BatchSizeScaling(BASE), ckpt_path=folder / "ddp.ckpt")
    counts = range(steps + 1, steps + BATCHES + 1)
    factors = [BATCH_SIZE / BASE * min(1.0, step / BATCHES) for step in counts]
    assert module.rates() == close(scaled([RATES] * BATCHES, factors))


def test_a_scheduled_batch_size_is_that_of_both_ranks_and_one_rank_continues(tmp_path):
    ranks = on_ranks(2, train_with_schedule, tmp_path)
    # A batch of both ranks is the next four numbers.
    means = numbers()[: 2 * SIZE * LIMIT].unflatten(0, (-1, 2 * SIZE)).mean(1)
    told = [each.mean().item() for each in (means[:1], means[1:2], means[2:])]
    moved = [-RATE * sum(told[:steps]) for steps in range(4)]
    for rank in ranks:
        assert rank["steps"] == [1, 2, 2, 2, 3]
        assert rank["stepped"] == pytest.approx(told, rel=1e-12)
        for (weights, step), steps in zip(rank["path"], rank["steps"], strict=True):
            assert step == steps
            assert weights == pytest.approx([moved[steps]] * 2, rel=1e-12)
    # Of one rank, twice the batches: 12 samples for the step after 20, then 8.
    module, schedule = Mean(), BatchSizeSchedule(BATCH_SIZES, unit="samples")
    walk(tmp_path, module, schedule, ckpt_path=tmp_path / "two ranks.ckpt")
    means = numbers().unflatten(0, (-1, SIZE)).mean(1)
    told = [each.mean().item() for each in (means[:6], means[6:10], means[10:])]
    assert module.stepped == pytest.approx(told, rel=1e-12)
