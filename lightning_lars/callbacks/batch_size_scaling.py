"""Scales the learning rate with the batch size."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_lars.class_names import has_class_named
from lightning_lars.learning_rate.batch_scaling import (
    ScalingRule,
    check_batch_size,
    scale_adam,
    scaling_exponent,
    scaling_factor,
)
from lightning_lars.rules import FLAG, counted
from lightning_lars.trainer.batch_size import (
    accumulated_batches,
    data_parallel_replicas,
    most_accumulated_batches,
    per_device_batch_size,
    takes_steps,
)
from lightning_lars.trainer.callback import Callback
from lightning_lars.trainer.learning_rate_owner import LearningRateOwner

# A rate tuned at 256 reaches it linearly below 32 samples, where few train with this package on purpose.
_SMALL_FACTOR = 1 / 8


class BatchSizeScaling(Callback):
    """Scales the learning rate of every step with the effective batch size, by a rule.

    ::

        effective batch size = per-device batch size * data-parallel replicas * accumulated batches
        lr in the step = lr of the schedule * scaling_factor(effective batch size, base_batch_size, rule)

    ``group["lr"]`` is always the scheduler's value, except inside the step and where ``LearningRateMonitor``
    reads it; so a checkpoint resumed on a different number of devices is rescaled. Follows a
    ``GradientAccumulationScheduler`` or ``BatchSizeSchedule``. Logs the batch size that it found and the
    resulting rates, and warns once if they are less than an eighth of the schedule's without ``batch_size``:
    some loaders count time series or graphs, and the samples of a step are many more.

    Groups with ``batch_size_scaling=False`` are not scaled: those that
    :func:`~lightning_lars.build_optimizer` gives an ``excluded_lr``, and any others with this key.

    Args:
        base_batch_size: Effective batch size at which the learning rate was tuned, above 0.
        rule: ``"linear"``, ``"sqrt"``, ``"none"``, or an exponent, as in
            :func:`~lightning_lars.learning_rate.scaling_factor`. ``"adam_sqrt"``: the square root, which
            also scales ``betas`` and ``eps``, as in :func:`~lightning_lars.learning_rate.scale_adam`.
        batch_size: Per-device batch size. None reads it from the train loader or, where that has none, from
            the first batch; before that, a ``LearningRateMonitor`` shows the plain rate.
        scale_excluded: Whether to scale groups with ``batch_size_scaling=False`` too.

    Raises:
        ValueError: If an argument breaks its rule; at the first batch, if one of several train loaders has
            no batch size.
        MisconfigurationException: At the start of training, if there are two of these callbacks, or a
            ``LearningRateFinder``, which finds a rate for the current batch size; or if ``"adam_sqrt"`` is
            used with an optimizer without ``betas`` and ``eps``, or with too large a batch; at the first
            batch, if its size cannot be determined either.

    Example:
        >>> from lightning import Trainer
        >>> from lightning_lars import BatchSizeScaling
        >>> trainer = Trainer(callbacks=[BatchSizeScaling(rule="sqrt")], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        base_batch_size: int = 256,
        rule: ScalingRule | float = "linear",
        batch_size: int | None = None,
        scale_excluded: bool = False,
    ) -> None:
        base_batch_size = check_batch_size("base_batch_size", base_batch_size)
        if batch_size is not None:
            batch_size = check_batch_size("batch_size", batch_size)
        scaling_exponent(rule)
        FLAG.check("scale_excluded", scale_excluded)
        self.base_batch_size = base_batch_size
        self.rule = rule
        self.batch_size = batch_size
        self.scale_excluded = scale_excluded
        self._first_batch_size: int | None = None
        self._counts_of_steps: tuple[int, int, int] | None = None
        self._last_message: str | None = None
        self._has_warned = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # In every stage: each loads the callbacks of a checkpoint.
        LearningRateOwner.of(trainer, self)
        if stage != "fit":
            return
        for callback in cast(Any, trainer).callbacks:
            if has_class_named(callback, "LearningRateFinder"):
                raise MisconfigurationException(
                    "BatchSizeScaling and LearningRateFinder are mutually exclusive: the rate that is found "
                    "is for the current batch size. Find it first, in a run with base_batch_size samples"
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_batch_size = self._counts_of_steps = self._last_message = None
        self._has_warned = False
        if self.rule == "adam_sqrt":
            for optimizer in trainer.optimizers:
                if not all("betas" in group and "eps" in group for group in optimizer.param_groups):
                    raise MisconfigurationException(
                        'BatchSizeScaling(rule="adam_sqrt") needs an optimizer with betas and eps, got '
                        f'{type(optimizer).__name__}: use rule="linear" or "sqrt"'
                    )
            self._check_largest_batch(trainer)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if self.scale_excluded and all(group.get("batch_size_scaling", True) for group in groups):
            rank_zero_warn(
                "BatchSizeScaling(scale_excluded=True) has no effect: every group is scaled anyway, because "
                "none has batch_size_scaling=False, which excluded_lr sets"
            )
        owner = LearningRateOwner.of(trainer, self)
        owner.adjust("batch-size scaling", lambda group, step: self._scaled(trainer, group))
        self._log_scaling(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_scaling(trainer)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._per_device(trainer) is None or (batch_idx == 0 and self._first_batch_size is not None):
            if isinstance(trainer.train_dataloader, Mapping | list | tuple):
                # The batches of several loaders may differ in size: raise the error that names the loader.
                per_device_batch_size(trainer)
            self._first_batch_size = _batch_size_of(batch)
            self._log_scaling(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._last_message = None

    def _per_device(self, trainer: Trainer) -> int | None:
        """Return the batch size from the argument, the loader, or the first batch, or None."""
        if self.batch_size is not None:
            return self.batch_size
        try:
            return per_device_batch_size(trainer)
        except ValueError:
            return self._first_batch_size

    def _counts(self, trainer: Trainer) -> tuple[int, int, int] | None:
        """Return samples per device, replicas, and accumulated batches of the steps, once they are known."""
        per_device = self._per_device(trainer)
        if per_device is not None and takes_steps(trainer):
            self._counts_of_steps = per_device, data_parallel_replicas(trainer), accumulated_batches(trainer)
        return self._counts_of_steps

    def _skips(self, group: Mapping[str, Any]) -> bool:
        return not (self.scale_excluded or group.get("batch_size_scaling", True))

    def _scaled(self, trainer: Trainer, group: Mapping[str, Any]) -> dict[str, Any]:
        counts = self._counts(trainer)
        # Before the first batch, only a monitor calls this.
        if counts is None or self._skips(group):
            return {}
        batch_size = prod(counts)
        scaled = {"lr": group["lr"] * scaling_factor(batch_size, self.base_batch_size, self.rule)}
        if self.rule == "adam_sqrt":
            scaled["betas"], scaled["eps"] = self._scaled_adam(group, batch_size)
        return scaled

    def _check_largest_batch(self, trainer: Trainer) -> None:
        """Raise if the rule does not hold for the largest batch of the run, as far as that is known."""
        counts = self._counts(trainer)
        if counts is None:
            return
        largest = counts[0] * counts[1] * most_accumulated_batches(trainer)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if not self._skips(group):
                    self._scaled_adam(group, largest)

    def _scaled_adam(self, group: Mapping[str, Any], batch_size: int) -> tuple[Any, float]:
        try:
            return scale_adam(group["betas"], group["eps"], batch_size / self.base_batch_size)
        except ValueError as error:
            raise MisconfigurationException(f"BatchSizeScaling: {error}") from None

    def _log_scaling(self, trainer: Trainer) -> None:
        """Log the effective batch size and the scaled rates, and again if an epoch starts with others."""
        counts = self._counts(trainer)
        if counts is None:
            return
        per_device, replicas, accumulated = counts
        factor = scaling_factor(prod(counts), self.base_batch_size, self.rule)
        found = (
            f"BatchSizeScaling: effective batch size {prod(counts)} = {per_device} per device x "
            f"{counted(replicas, 'replica')} x {accumulated} accumulated; {self.rule} from "
            f"{self.base_batch_size}: learning rate x {factor:.6g}"
        )
        if found == self._last_message:
            return
        self._last_message = found
        self._warn_of_few_samples(prod(counts), factor)
        rates = []
        for optimizer in trainer.optimizers:
            highest, lower = _highest_layer(optimizer.param_groups)
            for group in highest:
                name = "/".join(filter(None, [type(optimizer).__name__, group.get("name")]))
                before = f"{name} {float(group['lr']):.6g}"
                if self._skips(group):
                    rates.append(f"{before}, a separate rate, not scaled: scale_excluded=True scales it too")
                else:
                    rates.append(f"{before} -> {float(self._scaled(trainer, group)['lr']):.6g}")
            if lower:
                rates.append(f"likewise {counted(len(lower), 'group')} with a smaller lr_scale")
        rank_zero_info(f"{found} ({', '.join(rates)}).")

    def _warn_of_few_samples(self, batch_size: int, factor: float) -> None:
        """Warn once if the learning rate nearly vanishes at a batch size that was inferred, not given."""
        if self.batch_size is None and factor < _SMALL_FACTOR and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"BatchSizeScaling multiplies the learning rate by {factor:.3g}, because the effective batch "
                f"size {batch_size} is far below base_batch_size={self.base_batch_size}. If the train loader "
                "counts something larger than samples (time series, graphs, files), pass the samples as "
                "batch_size; if the rate was tuned at another batch size, pass that as base_batch_size"
            )


def _highest_layer(groups: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the groups with the largest ``lr_scale`` or none, and those that ``layer_decay`` puts below."""
    largest = max((group.get("lr_scale", 1.0) for group in groups), default=1.0)
    lower = [group for group in groups if group.get("lr_scale", largest) < largest]
    return [group for group in groups if group.get("lr_scale", largest) >= largest], lower


def _batch_size_of(batch: Any) -> int:
    try:
        return extract_batch_size(batch)
    except (MisconfigurationException, RecursionError) as error:
        raise MisconfigurationException(
            "BatchSizeScaling finds a batch size neither in the train loader nor in the first batch, "
            f"a {type(batch).__name__}: pass batch_size"
        ) from error
