"""The batch size that one optimizer step averages over."""

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_lars import effective_batch_size
from tests.support.walk import BATCHES, Walk, walk

DATA = torch.zeros(24, 1)


class Batches:
    """A sampler of batches that does not tell their size."""

    def __iter__(self):
        return iter(BatchSampler(range(24), 6, drop_last=False))

    def __len__(self):
        return 4


class Stream(IterableDataset):
    """Yields samples, or batches if it has a batch size."""

    def __init__(self, batch_size=None):
        if batch_size:
            self.batch_size = batch_size

    def __iter__(self):
        return iter(torch.zeros(12, getattr(self, "batch_size", 1), 1))


class Measured(Walk):
    """Asks for the effective batch size at the start of every epoch."""

    def __init__(self, loader=None):
        super().__init__()
        self.loader = loader
        self.sizes = []

    def train_dataloader(self):
        return self.loader() if self.loader else super().train_dataloader()

    def on_train_epoch_start(self):
        self.sizes.append(effective_batch_size(self.trainer))


LOADERS = {
    "batch size": (lambda: DataLoader(DATA, batch_size=4), 4),
    "batch sampler": (lambda: DataLoader(DATA, batch_sampler=BatchSampler(range(24), 5, False)), 5),
    "sampler of batches": (
        lambda: DataLoader(DATA, batch_size=None, sampler=BatchSampler(SequentialSampler(DATA), 3, False)),
        3,
    ),
    "stream": (lambda: DataLoader(Stream(), batch_size=4), 4),
    "stream of batches that tells": (lambda: DataLoader(Stream(7), batch_size=None), 7),
    "list": (lambda: [DataLoader(DATA, batch_size=4), DataLoader(DATA, batch_size=6)], 10),
    "dict": (lambda: {"a": DataLoader(DATA, batch_size=4), "b": DataLoader(DATA, batch_size=6)}, 10),
    "nested": (
        lambda: {
            "a": DataLoader(DATA, batch_size=4),
            "b": [DataLoader(DATA, batch_size=6), DataLoader(DATA, batch_size=1)],
        },
        11,
    ),
    "combined": (
        lambda: CombinedLoader([DataLoader(DATA, batch_size=4), DataLoader(DATA, batch_size=2)], "min_size"),
        6,
    ),
}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("loader", LOADERS)
def test_counts_the_samples_of_a_step(tmp_path, loader, accumulated):
    build, batch_size = LOADERS[loader]
    module = walk(tmp_path, Measured(build), accumulate_grad_batches=accumulated)
    assert module.sizes == [batch_size * accumulated] * 2


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(DATA, batch_sampler=Batches()),
        lambda: DataLoader(Stream(), batch_size=None),
        lambda: [DataLoader(DATA, batch_size=4), DataLoader(DATA, batch_sampler=Batches())],
    ],
)
def test_says_what_to_pass_where_the_loader_has_no_batch_size(tmp_path, loader):
    message = "batch_size must be given where the train loader has none, got a DataLoader"
    with pytest.raises(ValueError, match=message):
        walk(tmp_path, Measured(loader))


class Told(Measured):
    """Tells the batch size that its loader does not."""

    def on_train_epoch_start(self):
        self.sizes.append(effective_batch_size(self.trainer, batch_size=6))


def test_a_batch_size_that_is_given_is_believed(tmp_path):
    module = Told(lambda: DataLoader(DATA, batch_sampler=Batches()))
    assert walk(tmp_path, module, accumulate_grad_batches=3).sizes == [18, 18]


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True])
def test_refuses_a_bad_batch_size(tmp_path, batch_size):
    class Wrong(Walk):
        def on_train_start(self):
            effective_batch_size(self.trainer, batch_size=batch_size)

    with pytest.raises(ValueError, match=f"batch_size must be an integer above 0, got {batch_size}"):
        walk(tmp_path, Wrong())


def test_follows_a_gradient_accumulation_scheduler(tmp_path):
    accumulation = GradientAccumulationScheduler({0: 1, 1: 3, 3: 4})
    assert walk(tmp_path, Measured(), accumulation, max_epochs=4).sizes == [2, 6, 6, 8]


@pytest.mark.parametrize(("accumulated", "size"), [(BATCHES, 2 * BATCHES), (BATCHES + 1, 2 * BATCHES)])
def test_the_end_of_an_epoch_ends_the_accumulation(tmp_path, accumulated, size):
    assert walk(tmp_path, Measured(), accumulate_grad_batches=accumulated).sizes == [size, size]


class Growing(Measured):
    """Has larger batches in its second epoch."""

    def train_dataloader(self):
        self.batch_size = 2 * (1 + self.trainer.current_epoch)
        return super().train_dataloader()


def test_follows_a_loader_that_is_reloaded(tmp_path):
    assert walk(tmp_path, Growing(), reload_dataloaders_every_n_epochs=1).sizes == [2, 4]


def test_follows_the_batch_size_finder(tmp_path):
    module = walk(tmp_path, Measured(), BatchSizeFinder(max_trials=2, steps_per_trial=1))
    assert module.batch_size > 2
    # The trials of the finder ask before the two epochs do.
    assert module.sizes[-2:] == [module.batch_size] * 2


class AsksEarly(Walk):
    """Asks while it configures its optimizers, before Lightning has loaded the data."""

    def configure_optimizers(self):
        self.size = effective_batch_size(self.trainer)
        return super().configure_optimizers()


def test_is_known_where_optimizers_are_configured(tmp_path):
    module = walk(tmp_path, AsksEarly(), accumulate_grad_batches=3)
    assert module.size == 6
