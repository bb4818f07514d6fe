"""Runs a module for a few steps at a small batch size, and reports what that tells about larger ones."""

import math
from collections.abc import Sequence
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lars.advice.batch_sizes import LINEAR, batch_sizes, suggested_multiple
from lightning_lars.advice.groups import overview, peak_rates, unusual
from lightning_lars.advice.parts import CriticalBatchSize, ParameterGroup
from lightning_lars.advice.report import Advice
from lightning_lars.advice.state_memory import expected_bytes, held_bytes
from lightning_lars.advice.unknown import ALWAYS, NOT_MEASURED, of_run
from lightning_lars.callbacks.gradient_noise_scale import GradientNoiseScale
from lightning_lars.class_names import has_class_named
from lightning_lars.gradients.noise_scale import NoiseScale
from lightning_lars.groups.excluded_rate import is_excluded
from lightning_lars.groups.optimizer_names import kinds
from lightning_lars.learning_rate.batch_scaling import check_batch_size
from lightning_lars.rules import FLAG, WHOLE, require
from lightning_lars.sharding.shards import local
from lightning_lars.trainer.batch_size import (
    accumulated_batches,
    data_parallel_replicas,
    per_device_batch_size,
)
from lightning_lars.trainer.callback import Callback
from lightning_lars.trainer.micro_batches import MicroBatches
from lightning_lars.trainer.training_length import total_steps
from lightning_lars.trainer.trial_callbacks import StopAfterSteps, accumulates_by_callback, has_progress_bar
from lightning_lars.trainer.trial_run import run_trial
from lightning_lars.trust_ratios.peak_rate import PeakRate, largest

HISTORY = 12
"""Points of the history of the noise scale."""
_UNKNOWN_EPOCHS = 1000
"""Lightning's own default, for schedules that need a length."""


def advise(
    model: LightningModule,
    train_dataloaders: Any = None,
    datamodule: Any = None,
    trainer: Trainer | None = None,
    *,
    max_steps: int = 300,
    batch_size: int | None = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    train_copy: bool = True,
) -> Advice:
    """Measure, in a short run at a small batch size, what a larger one would gain and need.

    The critical batch size is the gradient noise scale, as :class:`~lightning_lars.GradientNoiseScale`
    measures it at every step, averaged over about the last third of them.

    A copy of the module trains, with a copy of the Trainer, in the schedule of the whole run. The module, the
    Trainer and the global random state stay as they were, also if the run fails; two calls in a row see the
    same random numbers, unless a loader has a generator of its own, which goes on. A data module is copied as
    by ``copy.copy``. Loggers and checkpoints, and callbacks that stop the run, are left out, and there is no
    validation.

    Only one rank and ``accumulate_grad_batches=1`` give no gradients of two batch sizes: the copy then
    accumulates two batches.

    Args:
        model: The module, with automatic optimization and a loss that is a mean over samples.
        train_dataloaders: As in ``Trainer.fit``.
        datamodule: As in ``Trainer.fit``.
        trainer: A Trainer as for the whole run, which has not run yet. None means one device and Lightning's
            defaults, a run of 1,000 epochs among them, whose steps are not reported. Its progress bar is
            replaced by one of the short run.
        max_steps: Optimizer steps, at least 0. At 0, nothing is measured: the report is of the groups, the
            memory and the rules.
        batch_size: Samples in a micro-batch. None reads it from the train loader or, where that has none,
            from the first batch.
        ckpt_path: The file of a checkpoint of the whole run to measure from.
        weights_only: As in ``Trainer.fit`` (Lightning 2.6), how to load the checkpoint.
        train_copy: False trains the module itself, for modules that ``copy.deepcopy`` cannot copy, and
            restores its ``state_dict``, and nothing else, at the end.

    Returns:
        What was measured and what it means. ``print()`` shows tables, ``to_json()`` returns JSON.

    Raises:
        ValueError: If an argument breaks its rule, or the Trainer has run, or has no steps to take.
        TypeError: If they are no LightningModule and Trainer, or cannot be copied.
        MisconfigurationException: If :class:`~lightning_lars.GradientNoiseScale` cannot measure: manual
            optimization, a strategy that shards, or a module without an optimizer.

    Example:
        >>> import torch
        >>> from lightning import LightningModule
        >>> from lightning_lars import advise
        >>> class Net(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(4, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return (self.layer(batch) - 1).pow(2).mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters(), lr=0.01)
        >>> loader = torch.utils.data.DataLoader(torch.randn(256, 4), batch_size=8)
        >>> advice = advise(Net(), loader, max_steps=8)
        >>> advice.batch_size, advice.measured_steps, advice.state_bytes["Adam"]
        (8, 8, 48)
        >>> advice.batch_sizes[2].batch_size, advice.batch_sizes[2].lr_sqrt
        (32, 0.02)
    """
    WHOLE.check("max_steps", max_steps)
    FLAG.check("train_copy", train_copy)
    if batch_size is not None:
        check_batch_size("batch_size", batch_size)
    by_name = ("best", "last", "hpc")  # among those of callbacks that are left out
    require("ckpt_path", f"a file, and none of {by_name}", ckpt_path, ckpt_path not in by_name)
    # By name, because lightning.pytorch and pytorch_lightning each define both.
    for argument, value, kind in (("model", model, "LightningModule"), ("trainer", trainer, "Trainer")):
        unwrapped = getattr(value, "_orig_mod", value)  # what torch.compile has wrapped
        if not has_class_named(unwrapped, kind) and value is not None:
            raise TypeError(f"{argument} must be a {kind}, got {value!r}")
    knows_length = trainer is not None
    if trainer is None:
        trainer = Trainer(devices=1, max_epochs=_UNKNOWN_EPOCHS, logger=False)
    accumulated = trainer.accumulate_grad_batches
    needs_two = trainer.world_size == 1 and accumulated == 1 and not accumulates_by_callback(trainer)
    measures = max_steps > 0
    noise_scale = GradientNoiseScale(1, max(0.0, 1 - 3 / max_steps), batch_size) if measures else None
    stop = StopAfterSteps(max_steps, "Measuring the noise scale" if has_progress_bar(trainer) else None)
    watch = _Watch(noise_scale, stop, batch_size, knows_length=knows_length)
    try:
        run_trial(
            trainer,
            model,
            stop,
            [watch] if noise_scale is None else [noise_scale, watch],
            train_dataloaders=train_dataloaders,
            datamodule=datamodule,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
            accumulate_grad_batches=2 if needs_two and measures and model.automatic_optimization else None,
            train_copy=train_copy,
        )
    except MisconfigurationException as error:
        if "GradientNoiseScale" not in str(error):
            raise
        raise MisconfigurationException(
            f"advise measures with a callback that cannot measure here. {error}. Or pass max_steps=0, which "
            "reports everything else without training"
        ) from error
    if not watch.has_begun or (measures and not stop.steps):
        raise ValueError(
            "trainer must have steps to take, got one without (limit_train_batches=0, max_steps=0), or a "
            "ckpt_path from the end of its run: raise its limits, or pass max_steps=0 to advise"
        )
    return watch.advice()


class _Watch(Callback):
    """Records what the advice is made of."""

    def __init__(
        self,
        noise_scale: GradientNoiseScale | None,
        stop: StopAfterSteps,
        batch_size: int | None,
        *,
        knows_length: bool,
    ) -> None:
        self._noise_scale = noise_scale
        self._stop = stop
        self._given = batch_size
        self._knows_length = knows_length
        self.has_begun = False
        self._peak = PeakRate()
        self._history: list[tuple[int, NoiseScale | None]] = []
        self._micro_batch: int | None = None
        self._state_bytes: dict[str, int] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizers: list[Any] = [each for each in trainer.optimizers if each.param_groups]
        if not optimizers:
            raise MisconfigurationException(
                "advise reads the parameter groups of an optimizer, got none: return one from "
                "configure_optimizers"
            )
        self.has_begun = True
        self._optimizer = ", ".join(kinds(optimizers))
        self._is_linear = all(has_class_named(each, *LINEAR) for each in optimizers)
        self._steps = total_steps(trainer) if self._knows_length else math.inf
        schedulers: dict[Any, list[Any]] = {each: [] for each in optimizers}
        for config in trainer.lr_scheduler_configs:
            schedulers.setdefault(getattr(config.scheduler, "optimizer", None), []).append(config.scheduler)
        rates = peak_rates(optimizers, schedulers)
        # On every rank, because they may call code of the model that communicates with other ranks.
        self._groups = overview(pl_module, optimizers, rates)
        self._unusual = unusual(pl_module, optimizers, rates, self._steps)
        self._is_distributed = trainer.world_size > 1
        replicas = data_parallel_replicas(trainer)
        # The copy accumulates what the Trainer does, until all callbacks have seen that training starts.
        self._own_samples = replicas * accumulated_batches(trainer)
        scaling = [each for each in cast(Any, trainer).callbacks if has_class_named(each, "BatchSizeScaling")]
        self._scaled_from = scaling[0].base_batch_size if scaling else None
        params = [p for each in optimizers for group in each.param_groups for p in group["params"]]
        trained = [p for p in params if p.requires_grad and not is_lazy(p)]
        self._parameter_bytes = sum(local(p).numel() * p.element_size() for p in trained)
        self._expected_bytes = expected_bytes(trained)
        if hasattr(optimizers[0], "_optimizer_step_pre_hooks"):
            # Registered after those of the callbacks that change the rate inside the step.
            optimizers[0].register_step_pre_hook(self._before_step)
        self._micro_batch = self._given or self._nominal_batch_size(trainer)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._micro_batch is None:
            micro_batches = MicroBatches(None)
            micro_batches.is_full(trainer, batch)
            self._micro_batch = micro_batches.size

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._stop.count(trainer) % max(1, self._stop.max_steps // HISTORY) == 0:
            self._record()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._noise_scale is None:
            return
        self._record()
        self._measured_samples = data_parallel_replicas(trainer) * accumulated_batches(trainer)
        states = [state for each in trainer.optimizers for state in each.state.values()]
        self._state_bytes = {self._optimizer: held_bytes(states)}

    def advice(self) -> Advice:
        """Return the advice, after the run."""
        assert self._micro_batch is not None
        batch_size = self._micro_batch * self._own_samples
        base_batch_size = self._scaled_from or batch_size
        main = _main_group(self._groups)
        critical = self._critical()
        b_simple = None if critical is None else critical.b_simple
        multiple = None if b_simple is None else suggested_multiple(batch_size, b_simple)
        steps = None if math.isinf(self._steps) else int(self._steps)
        if self._noise_scale is None:
            unknown: tuple[str, ...] = (*NOT_MEASURED, *ALWAYS[1:])
        else:
            peak = self._peak.read()
            unknown = of_run(
                critical,
                measured_steps=self._stop.steps,
                max_steps=self._stop.max_steps,
                batch_size=batch_size,
                is_in_warmup=peak.since < peak.longest_wait,  # it has risen, and may rise again
                is_distributed=self._is_distributed,
            )
        return Advice(
            optimizer=self._optimizer,
            batch_size=batch_size,
            base_batch_size=base_batch_size,
            measured_steps=self._stop.steps,
            steps=steps,
            critical=critical,
            suggested_batch_size=multiple and batch_size * multiple,
            batch_sizes=batch_sizes(
                batch_size,
                base_batch_size,
                None if main is None else main.lr,
                steps,
                b_simple,
                is_linear=self._is_linear,
            ),
            groups=self._groups,
            parameter_bytes=self._parameter_bytes,
            state_bytes={**self._state_bytes, **self._expected_bytes, **self._state_bytes},
            unusual=self._unusual,
            unknown=(*_on_rates(self._groups), *unknown),
        )

    def _critical(self) -> CriticalBatchSize | None:
        last = self._history[-1][1] if self._history else None
        if last is None:
            return None
        assert self._micro_batch is not None
        return CriticalBatchSize(
            **last._asdict(),
            batch_size=self._micro_batch * self._measured_samples,
            history=tuple((step, read and read.b_simple) for step, read in self._history),
        )

    def _record(self) -> None:
        steps = self._stop.steps
        if self._noise_scale is not None and steps > (self._history[-1][0] if self._history else 0):
            self._history.append((steps, self._noise_scale.read()))

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
        if rates:
            self._peak.update(largest(rates))

    def _nominal_batch_size(self, trainer: Trainer) -> int | None:
        try:
            return per_device_batch_size(trainer)
        except ValueError:
            if self._noise_scale is None:
                raise
            return None  # the first batch tells


def _main_group(groups: Sequence[ParameterGroup]) -> ParameterGroup | None:
    """Return the group with a learning rate that has the most elements, excluded ones last."""
    with_rate = [group for group in groups if group.lr is not None]
    return max(
        with_rate,
        key=lambda group: (not is_excluded({"name": group.name}), group.elements),
        default=None,
    )


def _on_rates(groups: Sequence[ParameterGroup]) -> list[str]:
    """Say whose learning rate is shown, if that depends on the group."""
    main = _main_group(groups)
    others = {group.lr for group in groups if group.lr is not None and not is_excluded({"name": group.name})}
    if main is None or len(others) < 2:
        return []
    return [
        f"Groups have different learning rates. The one shown is that of {main.name}, the largest group: "
        "scale the others by the same factor."
    ]
