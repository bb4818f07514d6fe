"""A run that dies in the middle of a step resumes from its last checkpoint."""

from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lars import LAMB, LARS
from lightning_lars.optim.step import Step
from tests.support.boring import boring, trainer
from tests.support.checkpoints import UNSAFELY

CRASHES_IN_STEP = 5


class CrashError(Exception):
    """What kills the training."""


class Dies:
    """Makes an optimizer die when it has moved the first of its groups and not yet the second."""

    moved = 0

    def step(self, closure=None):
        move = Step._move

        def move_or_die(*args):
            move(*args)
            self.moved += 1
            if self.moved == 2 * CRASHES_IN_STEP - 1:
                raise CrashError

        with patch.object(Step, "_move", move_or_die):
            return super().step(closure)


class CrashingLARS(Dies, LARS):
    pass


class CrashingLAMB(Dies, LAMB):
    pass


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("optimizer_class", "crashing"), [(LARS, CrashingLARS), (LAMB, CrashingLAMB)])
def test_a_crash_in_a_step_loses_nothing_that_was_saved(tmp_path, optimizer_class, crashing):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"max_steps": 8, "max_epochs": -1, "overfit_batches": 1}
    crashed = boring(crashing)
    with pytest.raises(CrashError):
        trainer(tmp_path, callbacks=[saving], enable_checkpointing=True, **options).fit(crashed)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]

    uninterrupted, resumed = boring(optimizer_class), boring(optimizer_class)
    trainer(tmp_path, **options).fit(uninterrupted)
    saving = ModelCheckpoint(tmp_path / "resumed", every_n_train_steps=2)
    resuming = trainer(tmp_path, callbacks=[saving], enable_checkpointing=True, **options)
    resuming.fit(resumed, ckpt_path=tmp_path / "step=4.ckpt", **UNSAFELY)
    assert resuming.global_step == 8
    for whole, again in zip(uninterrupted.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(whole, again)
    assert not torch.equal(next(crashed.parameters()), next(resumed.parameters()))
