"""Optimizers, groups and schedules in a loop of Lightning Fabric equal those in a plain loop."""

import pytest

from tests.support.ranks import on_ranks
from tests.workers.fabric_loop import OPTIMIZERS, STEPS, with_fabric, with_torch


@pytest.mark.parametrize("of", OPTIMIZERS)
def test_a_fabric_loop_equals_a_plain_loop_after_every_step_and_a_resume(tmp_path, of):
    deviations, ratios = with_fabric(of, tmp_path)
    assert len(deviations) == STEPS
    assert max(deviations) == 0
    assert ratios == pytest.approx(with_torch(of)[1], rel=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("of", OPTIMIZERS)
def test_a_fabric_loop_on_two_ranks_equals_one_device(tmp_path, of):
    for deviations, ratios in on_ranks(2, with_fabric, of, str(tmp_path), "ddp"):
        assert len(deviations) == STEPS
        assert max(deviations) < 1e-6
        assert ratios == pytest.approx(with_torch(of)[1], rel=1e-5)
