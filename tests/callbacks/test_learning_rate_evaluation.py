"""Evaluation from the checkpoint of a run, with the callbacks of the run."""

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_lars import BatchSizeScaling, LearningRateWarmup
from tests.support.checkpoints import safely
from tests.support.walk import BATCHES, OtherWalk, Walk, walker

ROOTS = {"lightning": (lightning.pytorch, Walk), "pytorch_lightning": (pytorch_lightning, OtherWalk)}
CALLBACKS = {
    "both": lambda callbacks: [LearningRateWarmup(5), BatchSizeScaling(3)],
    "warmup": lambda callbacks: [LearningRateWarmup(5)],
    "scaling": lambda callbacks: [BatchSizeScaling(3)],
    "monitored": lambda callbacks: [
        callbacks.LearningRateMonitor(),
        LearningRateWarmup(5),
        callbacks.LearningRateMonitor("step"),
    ],
}


def evaluated(module):
    """The class of module, with all that its Trainer asks for."""

    class Evaluated(module):
        def validation_step(self, batch, batch_idx):
            return self.a

        test_step = predict_step = validation_step

        def val_dataloader(self):
            return self.train_dataloader()

        test_dataloader = predict_dataloader = val_dataloader

    return Evaluated()


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("callbacks", CALLBACKS)
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.filterwarnings("ignore:.*log_every_n_steps")
def test_says_nothing_of_callbacks_that_are_missing(tmp_path, root, callbacks, stage):
    """Warnings are errors."""
    package, module = ROOTS[root]
    options = {"root": package, "logger": CSVLogger(tmp_path), "limit_val_batches": 2}
    fitting = walker(tmp_path, *CALLBACKS[callbacks](package.callbacks), **options)
    fitting.fit(evaluated(module))
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    for evaluating in (fitting, walker(tmp_path, *CALLBACKS[callbacks](package.callbacks), **options)):
        safely(getattr(evaluating, stage), evaluated(module), ckpt_path=tmp_path / "after.ckpt")


def test_a_fit_after_it_starts_from_the_first_step(tmp_path):
    module = evaluated(Walk)
    fitting = walker(tmp_path, LearningRateWarmup(5), max_epochs=1)
    fitting.fit(module)
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    safely(fitting.validate, module, ckpt_path=tmp_path / "after.ckpt")
    first = module.rates()
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module)
    assert module.rates() == [pytest.approx(rates, rel=1e-12, abs=1e-14) for rates in first]
    fitting.save_checkpoint(tmp_path / "again.ckpt")
    state = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert state["callbacks"]["LearningRateOwner"] == {"steps": [BATCHES], "beginning": (1, BATCHES)}
