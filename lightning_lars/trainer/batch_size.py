"""The batch size that one optimizer step of a Trainer averages over."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from lightning.pytorch import Trainer

from lightning_lars.learning_rate.batch_scaling import check_batch_size


def effective_batch_size(trainer: Trainer, batch_size: int | None = None) -> int:
    """Return how many samples one optimizer step averages over.

    ::

        effective batch size = per-device batch size * data-parallel replicas * accumulated batches

    The replicas are those of the strategy's sampler: under tensor parallelism fewer than the processes. The
    accumulated batches follow a ``GradientAccumulationScheduler``; an epoch of fewer batches ends the
    accumulation. Several train loaders add up. Loads the train loader where that has not happened, so
    under a distributed strategy every process must call it.

    Args:
        trainer: A Trainer that is fitting.
        batch_size: Per-device batch size; None reads it from the train loader.

    Returns:
        The number of samples.

    Raises:
        ValueError: If a loader does not tell its batch size, or ``batch_size`` is not a whole number
            above 0.

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
    check_batch_size("batch_size", per_device)
    return per_device * data_parallel_replicas(trainer) * accumulated_batches(trainer)


def per_device_batch_size(trainer: Trainer) -> int:
    """Return the number of samples in a batch on one device, from the train loaders.

    Raises:
        ValueError: If a loader does not tell.
    """
    if cast(Any, trainer).strategy.lightning_module is None:
        raise ValueError(
            "trainer must be fitting to tell its batch size, got one that is not: call this in a hook"
        )
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    return sum(_batch_size_of(loader) for loader in _flatten(trainer.train_dataloader))


def data_parallel_replicas(trainer: Trainer) -> int:
    """Return how many different batches the processes of the Trainer work on at a time."""
    sampler = trainer.distributed_sampler_kwargs
    return 1 if sampler is None else int(sampler["num_replicas"])


def accumulated_batches(trainer: Trainer, epoch: int | None = None) -> int:
    """Return how many batches one optimizer step accumulates in an epoch, by default the current one."""
    epoch = trainer.current_epoch if epoch is None else epoch
    accumulated = trainer.accumulate_grad_batches
    for callback in cast(Any, trainer).callbacks:
        # GradientAccumulationScheduler, of either package, writes to the Trainer only as the epoch starts.
        if hasattr(callback, "get_accumulate_grad_batches"):
            accumulated = callback.get_accumulate_grad_batches(epoch)
    # Lightning steps on the last batch of an epoch, whatever has been accumulated by then.
    return int(max(1, min(accumulated, trainer.num_training_batches)))


def takes_steps(trainer: Trainer) -> bool:
    """Tell whether an epoch takes optimizer steps; that which ``StochasticWeightAveraging`` adds does not.

    It accumulates more batches than there are, which is no batch size.
    """
    # No public attribute says that Lightning skips the backward pass.
    return not trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward


def _flatten(loaders: Any) -> Iterable[Any]:
    if isinstance(loaders, Mapping):
        loaders = loaders.values()
    elif not isinstance(loaders, list | tuple):
        return [loaders]
    return [loader for nested in loaders for loader in _flatten(nested)]


def _batch_size_of(loader: Any) -> int:
    # A loader batches by itself, by its batch sampler, by a sampler of batches, or not at all.
    sources = [loader, *(getattr(loader, name, None) for name in ("batch_sampler", "sampler", "dataset"))]
    for source in sources:
        batch_size = getattr(source, "batch_size", None)
        if isinstance(batch_size, int):
            return batch_size
    raise ValueError(
        f"batch_size must be given where the train loader does not tell it, got a {type(loader).__name__} "
        "without a batch_size of its own, its batch sampler, sampler or dataset"
    )
