"""Records a short run of a module, and returns the advice that follows from it."""

import math
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lars.advice.batch_sizes import LINEAR, batch_sizes, suggested_multiple
from lightning_lars.advice.groups import main_group, overview, peak_rates, unusual
from lightning_lars.advice.parts import CriticalBatchSize
from lightning_lars.advice.report import Advice
from lightning_lars.advice.state_memory import expected_bytes, held_bytes
from lightning_lars.advice.unknown import ALWAYS, NOT_MEASURED, of_rates, of_run
from lightning_lars.callbacks.gradient_noise_scale import GradientNoiseScale
from lightning_lars.class_names import has_class_named
from lightning_lars.gradients.noise_scale import NoiseScale
from lightning_lars.groups.optimizer_names import kinds
from lightning_lars.sharding.shards import local
from lightning_lars.trainer.batch_size import (
    accumulated_batches,
    data_parallel_replicas,
    per_device_batch_size,
)
from lightning_lars.trainer.callback import Callback
from lightning_lars.trainer.micro_batches import MicroBatches
from lightning_lars.trainer.training_length import total_steps
from lightning_lars.trainer.trial_callbacks import StopAfterSteps
from lightning_lars.trust_ratios.peak_rate import PeakRate, largest

HISTORY = 12
"""Points of the history of the noise scale."""


class ShortRun(Callback):
    """Records a short run, and returns the advice that follows from it.

    Args:
        noise_scale: Measures the noise scale; None if the run takes no steps.
        stop: Ends the run, and counts its steps.
        batch_size: Samples in a micro-batch; None reads it from the train loader or the first batch.
        knows_length: Whether the Trainer is as for the whole run.
    """

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
        self._begin = trainer.global_step
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
        main = main_group(self._groups)
        critical = self._critical()
        b_simple = None if critical is None else critical.b_simple
        multiple = None if b_simple is None else suggested_multiple(batch_size, b_simple)
        steps = None if math.isinf(self._steps) else int(self._steps)
        if self._noise_scale is None:
            unknown: tuple[str, ...] = (*NOT_MEASURED, *ALWAYS)
        else:
            peak = self._peak.read()
            unknown = of_run(
                critical,
                measured_steps=self._stop.steps,
                max_steps=self._stop.max_steps,
                batch_size=batch_size,
                is_in_warmup=peak.since < peak.longest_wait,  # it has risen, and may rise again
                is_distributed=self._is_distributed,
                begin=self._begin,
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
            # The measured state first, and in place of the computed one of the same name.
            state_bytes={**self._state_bytes, **self._expected_bytes, **self._state_bytes},
            unusual=self._unusual,
            unknown=(*of_rates(main, self._groups), *unknown),
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
            return None  # until the first batch
