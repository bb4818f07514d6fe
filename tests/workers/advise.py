"""Advice on two ranks."""

from lightning.pytorch.strategies import DDPStrategy

from lightning_lars import advise
from tests.support.boring import trainer
from tests.workers.noise_scale import CLOSED_FORM, Shared


def on_this_rank(folder):
    """What this rank is told."""
    fitting = trainer(folder, strategy=DDPStrategy(), devices=2, use_distributed_sampler=False)
    return advise(Shared(**CLOSED_FORM), trainer=fitting, max_steps=60).to_json()
