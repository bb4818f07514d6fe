"""Extra passes over training batches in the middle of a run, without affecting it."""

import random
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader


@contextmanager
def preserve_training_state(
    trainer: Trainer, pl_module: LightningModule, trained: Iterable[_BatchNorm]
) -> Iterator[None]:
    """Put the module in eval mode, and restore modes, buffers and random states on exit.

    The momentum of the layers in ``trained`` is restored too. The Trainer reports that it is training, for
    hooks that ask, such as those that augment batches on the device.
    """
    modes = [(module, module.training) for module in pl_module.modules()]
    momenta = [(layer, layer.momentum) for layer in trained]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module, _ in modes
        for name, buffer in module.named_buffers(recurse=False)
    ]
    python, numpy = random.getstate(), np.random.get_state()
    device, stage = trainer.strategy.root_device, trainer.state.stage
    try:
        for module, _ in modes:
            module.training = False
        trainer.training = True
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        trainer.state.stage = stage
        random.setstate(python)
        np.random.set_state(numpy)
        for module, name, buffer, values in buffers:
            buffer.copy_(values)
            setattr(module, name, buffer)
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode


def training_batches(
    trainer: Trainer, pl_module: LightningModule, num_batches: int, description: str
) -> Generator[Any, None, None]:
    """Yield up to ``num_batches`` training batches, on the device.

    Progress is shown under the description, next to the Trainer's progress bars, if any.

    Raises:
        MisconfigurationException: If the data cannot be iterated without disturbing training.
    """
    # The Trainer's public train_dataloader does not reveal how several loaders are combined.
    combined = copy(trainer.fit_loop._combined_loader)
    assert combined is not None
    combined.flattened = [_independent_copy(loader) for loader in combined.flattened]
    total = int(min(num_batches, trainer.num_training_batches))
    try:
        with _progress(trainer, total, description) as advance:
            for batch, _, _ in islice(combined, total):
                converted = trainer.precision_plugin.convert_input(batch)
                # The first batch-transfer hook has no public caller.
                converted = pl_module._on_before_batch_transfer(converted)
                yield trainer.strategy.batch_to_device(converted)
                advance()
    finally:
        combined.reset()  # stops worker processes


def _independent_copy(loader: Any) -> Any:
    """Return a loader of the same data whose iteration does not affect the training loader."""
    for each in (loader, getattr(loader, "dataset", None)):
        if isinstance(each, Iterator):
            raise MisconfigurationException(
                f"PreciseBatchNorm cannot iterate {type(each).__name__}, which is an iterator, without "
                "taking the batches away from training: give the Trainer data whose __iter__ starts over, "
                "such as a DataLoader over a Dataset"
            )
    if not isinstance(loader, DataLoader):
        return loader
    kept = (loader.dataset, loader.collate_fn, loader.worker_init_fn)
    try:
        # Samplers and generators are copied; a persistent iterator, which training uses, is not.
        return deepcopy(loader, {**{id(each): each for each in kept}, id(loader._iterator): None})
    except Exception as error:
        raise MisconfigurationException(
            "PreciseBatchNorm must iterate a copy of the train loader, whose sampler "
            f"{type(loader.sampler).__name__} or batch sampler {type(loader.batch_sampler).__name__} cannot "
            "be copied: give it a __deepcopy__"
        ) from error


@contextmanager
def _progress(trainer: Trainer, total: int, description: str) -> Iterator[Callable[[], object]]:
    bar: Any = trainer.progress_bar_callback
    # No bar, a custom bar, or a rank other than 0.
    disabled = getattr(bar, "is_disabled", True)
    if not disabled and getattr(bar, "progress", None) is not None:  # rich
        task = bar.progress.add_task(description, total=total)
        try:
            yield partial(bar.progress.advance, task)
        finally:
            # Hidden, not removed, because Lightning counts the tasks.
            bar.progress.update(task, visible=False)
    elif not disabled and hasattr(bar, "process_position"):  # tqdm
        with Tqdm(
            desc=description,
            total=total,
            position=2 * bar.process_position + 2,  # below the bars for training and validation
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
        ) as shown:
            yield shown.update
    else:
        yield lambda: None
