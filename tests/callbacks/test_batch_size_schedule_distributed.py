"""Two ranks follow the schedule of the batch size of both together, and one continues it."""

import pytest

from lightning_lars import BatchSizeSchedule
from tests.support.mean import SIZE, Mean, numbers
from tests.support.ranks import on_ranks
from tests.support.walk import walker
from tests.workers.batch_size_schedule import BATCH_SIZES, LIMIT, train

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:.*fit\\(ckpt_path=")]


def close(values):
    return pytest.approx(values, rel=1e-12, abs=1e-15)


def test_a_step_is_the_mean_over_the_batches_of_both_ranks_and_one_rank_continues(tmp_path):
    seen = on_ranks(2, train, tmp_path)
    # A batch of both ranks is the next four numbers.
    means = numbers()[: 2 * SIZE * LIMIT].unflatten(0, (-1, 2 * SIZE)).mean(1)
    told = [means[0], means[1], means[2:].mean()]
    for rank in seen:
        assert rank["steps"] == [1, 2, 2, 2, 3]
        assert rank["stepped"] == close([each.item() for each in told])
    # Of one rank, twice the batches: 8 samples after 20, that is, 12 for the first step, then 8.
    module = Mean()
    schedule = BatchSizeSchedule(BATCH_SIZES, unit="samples")
    walker(tmp_path, schedule).fit(module, ckpt_path=tmp_path / "two ranks.ckpt")
    means = numbers().unflatten(0, (-1, SIZE)).mean(1)
    told = [means[:6], means[6:10], means[10:]]
    assert module.stepped == close([each.mean().item() for each in told])
