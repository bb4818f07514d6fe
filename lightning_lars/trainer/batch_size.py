"""Rules that turn a batch size into a factor on the learning rate, and the batch size of a Trainer."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

from lightning.pytorch import Trainer

ScalingRule = Literal["linear", "sqrt", "adam_sqrt", "none"]
SCALING_RULES = ("linear", "sqrt", "adam_sqrt", "none")


def scaling_factor(batch_size: float, base_batch_size: float, rule: ScalingRule | float) -> float:
    """Return the factor on a learning rate that was found at ``base_batch_size``.

    ::

        linear            batch_size / base_batch_size                  Goyal et al. 2017
        sqrt, adam_sqrt   sqrt(batch_size / base_batch_size)            Krizhevsky 2014
        an exponent p     (batch_size / base_batch_size) ** p
        none              1

    Args:
        batch_size: Effective batch size, above 0.
        base_batch_size: Batch size that the learning rate belongs to, above 0.
        rule: One of the names above, or the exponent.

    Raises:
        ValueError: If a batch size is not above 0, or the rule is unknown.

    Example:
        >>> from lightning_lars.trainer.batch_size import scaling_factor
        >>> [scaling_factor(4096, 256, rule) for rule in ("linear", "sqrt", 0.25, "none")]
        [16.0, 4.0, 2.0, 1.0]
    """
    for name, value in {"batch_size": batch_size, "base_batch_size": base_batch_size}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value!r}")
    return float((batch_size / base_batch_size) ** scaling_exponent(rule))


def scaling_exponent(rule: ScalingRule | float) -> float:
    """Return the exponent of a rule: 1 for linear, 1/2 for the square roots, 0 for none.

    Raises:
        ValueError: If the rule is unknown.
    """
    exponents = {"linear": 1.0, "sqrt": 0.5, "adam_sqrt": 0.5, "none": 0.0}
    if isinstance(rule, int | float) and not isinstance(rule, bool) and math.isfinite(rule):
        return float(rule)
    if not isinstance(rule, str) or rule not in exponents:
        raise ValueError(f"rule must be one of {SCALING_RULES} or an exponent, got {rule!r}")
    return exponents[rule]


def scale_adam(betas: tuple[float, float], eps: float, ratio: float) -> tuple[tuple[float, float], float]:
    """Scale what Adam needs beside the square root of its learning rate.

    ::

        beta' = 1 - ratio * (1 - beta)
        eps' = eps / sqrt(ratio)

    Malladi et al. 2022, arXiv:2205.10287, the square root scaling rule, for a batch ``ratio`` times as
    large.

    Args:
        betas: Adam's betas at the base batch size.
        eps: Adam's eps at the base batch size.
        ratio: Batch size over base batch size, above 0.

    Returns:
        The betas and eps for the new batch size.

    Raises:
        ValueError: If the ratio would make a beta negative.

    Example:
        >>> from lightning_lars.trainer.batch_size import scale_adam
        >>> betas, eps = scale_adam((0.9, 0.999), 1e-8, ratio=4)
        >>> [round(beta, 6) for beta in betas], eps
        ([0.6, 0.996], 5e-09)
    """
    scaled = tuple(1 - ratio * (1 - beta) for beta in betas)
    if min(scaled) < 0:
        largest = min(1 / (1 - beta) for beta in betas)
        raise ValueError(
            f'rule="adam_sqrt" holds up to {largest:.4g} times the base batch size with betas={betas}, '
            f'got {ratio:.4g} times: use rule="sqrt" or a base batch size nearer to it'
        )
    return (scaled[0], scaled[1]), eps / math.sqrt(ratio)


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


def check_batch_size(argument: str, value: object) -> None:
    """Raise ValueError unless the value is a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{argument} must be a whole number above 0, got {value!r}")


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
