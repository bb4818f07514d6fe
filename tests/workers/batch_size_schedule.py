"""A run of two ranks with a schedule of the batch size."""

from lightning_lars import BatchSizeSchedule
from tests.support.mean import SIZE, Mean, numbers
from tests.support.walk import walker

BATCH_SIZES = {0: 4, 8: 12, 28: 8}
"""By samples: of both ranks, in batches of 2 each."""
LIMIT = 5


class Shared(Mean):
    """Gives the two ranks one batch after the other."""

    def training_step(self, batch, batch_idx):
        return self.w * numbers().unflatten(0, (-1, SIZE))[2 * batch_idx + self.global_rank].mean()


def train(folder):
    """Return the steps after every batch, and their gradients; keep a checkpoint of the epoch."""
    module = Shared()
    trainer = walker(
        folder,
        BatchSizeSchedule(BATCH_SIZES, unit="samples"),
        strategy="ddp",
        devices=2,
        limit_train_batches=LIMIT,
        max_epochs=1,
    )
    trainer.fit(module)
    trainer.save_checkpoint(folder / "two ranks.ckpt")
    return {"stepped": module.stepped, "steps": [steps for _, steps in module.accumulated]}
