"""The effective batch size of a Trainer: the samples that one optimizer step averages over."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from lightning.pytorch import Trainer

from lightning_lars.class_names import has_class_named
from lightning_lars.learning_rate.batch_scaling import check_batch_size
from lightning_lars.rules import as_int


def effective_batch_size(trainer: Trainer, batch_size: int | None = None) -> int:
    """Return the number of samples that one optimizer step averages over.

    ::

        effective batch size = per-device batch size * data-parallel replicas * accumulated batches

    The replicas are those of the strategy's sampler: under tensor parallelism there are fewer than ranks. The
    accumulated batches follow a ``GradientAccumulationScheduler``; an epoch with fewer batches ends the
    accumulation. Batch sizes of several train loaders add up. Loads the train loader if necessary, so under a
    distributed strategy every rank must call this.

    Args:
        trainer: A Trainer that is fitting.
        batch_size: Per-device batch size; None reads it from the train loader.

    Returns:
        The number of samples.

    Raises:
        ValueError: If a loader has no batch size, or ``batch_size`` is not an integer above 0.

    Example:
        >>> import lightning
        >>> from lightning_lars import effective_batch_size
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Model(BoringModel):
        ...     def on_train_start(self):
        ...         print(effective_batch_size(self.trainer))
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> quiet |= dict(enable_model_summary=False, accelerator="cpu", devices=1)
        >>> lightning.Trainer(max_steps=1, accumulate_grad_batches=4, **quiet).fit(Model())
        4
    """
    per_device = per_device_batch_size(trainer) if batch_size is None else batch_size
    per_device = check_batch_size("batch_size", per_device)
    return per_device * data_parallel_replicas(trainer) * accumulated_batches(trainer)


def per_device_batch_size(trainer: Trainer) -> int:
    """Return the number of samples in a batch on one device, from the train loaders.

    Raises:
        ValueError: If a loader has no batch size.
    """
    if cast(Any, trainer).strategy.lightning_module is None:
        raise ValueError(
            "effective_batch_size() needs a Trainer that is fitting: call it from a callback or module hook"
        )
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    return sum(_batch_size_of(loader) for loader in _flatten(trainer.train_dataloader))


def data_parallel_replicas(trainer: Trainer) -> int:
    """Return the number of data-parallel replicas, each of which processes a different batch."""
    sampler = trainer.distributed_sampler_kwargs
    return 1 if sampler is None else int(sampler["num_replicas"])


def accumulated_batches(trainer: Trainer, epoch: int | None = None) -> int:
    """Return the number of batches that an optimizer step accumulates in an epoch (default: the current)."""
    epoch = trainer.current_epoch if epoch is None else epoch
    accumulated = trainer.accumulate_grad_batches
    for callback in cast(Any, trainer).callbacks:
        # GradientAccumulationScheduler, of either package, writes to the Trainer only as the epoch starts.
        if hasattr(callback, "get_accumulate_grad_batches"):
            accumulated = callback.get_accumulate_grad_batches(epoch)
    # Lightning steps on the last batch of an epoch, however many have been accumulated by then.
    return int(max(1, min(accumulated, trainer.num_training_batches)))


def most_accumulated_batches(trainer: Trainer) -> int:
    """Return the largest number of batches that any optimizer step of the run accumulates."""
    most = trainer.accumulate_grad_batches
    for callback in cast(Any, trainer).callbacks:
        if has_class_named(callback, "GradientAccumulationScheduler"):
            most = max(most, *callback.scheduling.values())
        if has_class_named(callback, "BatchSizeSchedule"):
            most = max(most, callback.most_accumulated_batches)
    return int(max(1, min(most, trainer.num_training_batches)))


def takes_steps(trainer: Trainer) -> bool:
    """Return whether an epoch takes optimizer steps.

    The extra epoch of ``StochasticWeightAveraging`` takes none: it accumulates more batches than there are,
    so it has no effective batch size.
    """
    # No public attribute shows that Lightning skips the backward pass.
    return not trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward


def _flatten(loaders: Any) -> Iterable[Any]:
    if isinstance(loaders, Mapping):
        loaders = loaders.values()
    elif not isinstance(loaders, list | tuple):
        return [loaders]
    return [loader for nested in loaders for loader in _flatten(nested)]


def _batch_size_of(loader: Any) -> int:
    # A loader batches itself, or through its batch sampler, a sampler of batches, or its dataset.
    sources = [loader, *(getattr(loader, name, None) for name in ("batch_sampler", "sampler", "dataset"))]
    for source in sources:
        batch_size = as_int(getattr(source, "batch_size", None))
        if isinstance(batch_size, int):
            return batch_size
    raise ValueError(
        f"batch_size must be given where the train loader has none, got a {type(loader).__name__} without a "
        "batch_size attribute on itself, its batch sampler, sampler or dataset"
    )
