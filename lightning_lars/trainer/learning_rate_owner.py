"""The single callback of a Trainer that adjusts learning rates, on behalf of other callbacks."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lars.class_names import has_class_named
from lightning_lars.groups.optimizer_names import by_name
from lightning_lars.groups.stale_parameters import check_holds_parameters
from lightning_lars.learning_rate.step_factors import Adjustment, StepFactors
from lightning_lars.trainer.callback import Callback
from lightning_lars.trainer.training_length import Beginning


class LearningRateOwner(Callback):
    """Applies the adjustments of several callbacks during each step, and counts the steps that took place.

    Inserts itself at the head of the Trainer's callbacks, so that checkpoints hold its count, and a window
    around every ``LearningRateMonitor``, so that it logs the rates that the steps use.
    """

    def __init__(self) -> None:
        self._adjustments: dict[str, Adjustment] = {}
        self._step_factors: dict[str, StepFactors] = {}
        self._adjusted: list[Any] = []
        self._steps: list[int] = []
        self._beginning = Beginning(epoch=0, step=0)
        self._has_trained = False

    @classmethod
    def of(cls, trainer: Trainer, requester: Callback) -> "LearningRateOwner":
        """Return the owner of a Trainer, inserting it if necessary. To be called in ``setup``.

        The requesting callback is moved right behind the owner, so that it sees a batch before any monitor.
        """
        callbacks = cast(Any, trainer).callbacks
        owner = next((callback for callback in callbacks if isinstance(callback, cls)), None) or cls()
        # BatchSizeSchedule sets the batch size of a step, which the requester reads.
        schedules = [callback for callback in callbacks if has_class_named(callback, "BatchSizeSchedule")]
        arranged: list[Any] = [*schedules, owner, requester]
        for callback in callbacks:
            if callback is requester or isinstance(callback, LearningRateOwner | _Window):
                continue
            if callback in schedules:
                continue
            if has_class_named(callback, "LearningRateMonitor"):
                arranged += [_Window(owner.open), callback, _Window(owner.close)]
            else:
                arranged.append(callback)
        # A new list: Lightning is iterating over the old one while it calls `setup`.
        cast(Any, trainer).callbacks = arranged
        return owner

    def adjust(self, name: str, adjustment: Adjustment) -> None:
        """Apply an adjustment from the next step on. To be called in ``on_train_start``.

        Raises:
            MisconfigurationException: If the name is taken: two callbacks would make the same adjustment.
        """
        if name in self._adjustments:
            raise MisconfigurationException(
                f"The Trainer has two callbacks for the {name} of the learning rate: remove one"
            )
        self._adjustments[name] = adjustment

    @property
    def steps(self) -> list[int]:
        """Number of steps of every optimizer since its first."""
        return [factors.steps.taken for factors in self._step_factors.values()] or self._steps

    @property
    def beginning(self) -> Beginning:
        """The Trainer's progress when the optimizers were created: a second fit creates new ones."""
        return self._beginning

    def open(self) -> None:
        """Make the adjusted values visible outside of a step."""
        for factors in self._step_factors.values():
            factors.apply()

    def close(self) -> None:
        """Restore the plain values."""
        for factors in self._step_factors.values():
            factors.restore()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Every fit has new optimizers. The count of a checkpoint is loaded after this.
        if stage == "fit":
            self._steps, self._beginning = [], Beginning(epoch=0, step=0)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        self._adjust_optimizers(trainer, pl_module)
        is_resumed = cast(Any, trainer).ckpt_path is not None
        if len(self._steps) != len(self._step_factors):
            # A checkpoint written without this callback: Lightning's own count is the best estimate.
            steps = trainer.global_step if is_resumed else 0
            self._steps = [steps // max(1, len(self._step_factors))] * len(self._step_factors)
        if not is_resumed:
            self._beginning = Beginning(trainer.current_epoch, trainer.global_step)
        for factors, taken in zip(self._step_factors.values(), self._steps, strict=True):
            factors.steps.taken = taken

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if [*map(id, self._adjusted)] != [*map(id, trainer.optimizers)]:
            # Set up again in the middle of a fit: new optimizers begin with their first step.
            self._adjust_optimizers(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._has_trained = True
        # A step that raised, and whose exception was caught, has not restored the plain values.
        self.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Not earlier, because any hook of the module may step.
        for name, factors in self._step_factors.items():
            if self._has_trained and factors.steps.taken == 0:
                rank_zero_warn(
                    f"{', '.join(self._adjustments)} of the learning rate had no effect on {name}, which "
                    "took no step that counts: optimizer.step(), during fit, with a gradient, and not "
                    "skipped by a gradient scaler"
                )
        self._detach()

    @override
    def state_dict(self) -> dict[str, Any]:
        begun = {"beginning": tuple(self._beginning)} if any(self._beginning) else {}
        return {"steps": list(self.steps), **begun}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = list(state_dict["steps"])
        self._beginning = Beginning(*state_dict.get("beginning", (0, 0)))
        # The tuner restores in the middle of a fit.
        for factors, taken in zip(self._step_factors.values(), self._steps, strict=False):
            factors.steps.taken = taken

    def _adjust_optimizers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adjust the Trainer's current optimizers; those that it already had keep their counts."""
        _check(trainer.optimizers)
        known = dict(zip(map(id, self._adjusted), self._step_factors.values(), strict=True))
        # An error ends the fit, which detaches all that are registered here.
        self._step_factors, self._adjusted = {}, list(trainer.optimizers)
        for name, optimizer in by_name(trainer.optimizers).items():
            factors = known.pop(id(optimizer), None) or self._factors_of(optimizer, trainer)
            self._step_factors[name.strip("/") or type(optimizer).__name__] = factors
            # DeepSpeed's wrapper is no Optimizer, and has other parameters.
            if isinstance(optimizer, Optimizer):
                check_holds_parameters(optimizer, trainer.model or pl_module)
        for factors in known.values():
            factors.detach()

    def _factors_of(self, optimizer: Any, trainer: Trainer) -> StepFactors:
        try:
            # The tuner removes callbacks while it tries rates and batch sizes in the middle of a fit.
            return StepFactors(optimizer, self._adjust_group, counts=lambda: _is_among(self, trainer))
        except TypeError as error:
            raise MisconfigurationException(
                f"LearningRateWarmup and BatchSizeScaling act inside optimizer.step(), and {error}: "
                "put the factor into the schedule (WarmupDecayLR), or remove the callbacks"
            ) from error

    def _adjust_group(self, group: Mapping[str, Any], step: int) -> Mapping[str, Any]:
        adjusted: dict[str, Any] = {}
        for adjustment in self._adjustments.values():
            adjusted |= adjustment({**group, **adjusted}, step)
        return adjusted

    def _detach(self) -> None:
        # A checkpoint may be written after this.
        self._steps = list(self.steps)
        for factors in self._step_factors.values():
            factors.detach()
        self._step_factors, self._adjusted, self._adjustments, self._has_trained = {}, [], {}, False


def _is_among(callback: Callback, trainer: Trainer) -> bool:
    return torch.compiler.is_compiling() or any(callback is each for each in cast(Any, trainer).callbacks)


def _check(optimizers: Sequence[Any]) -> None:
    """Raise if there is no optimizer, or one without a learning rate to multiply."""
    # Without an optimizer, Lightning uses an empty placeholder.
    if not any(optimizer.param_groups for optimizer in optimizers):
        raise MisconfigurationException(
            "LearningRateWarmup and BatchSizeScaling need an optimizer with a learning rate, and "
            "configure_optimizers returned none: remove the callbacks"
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not isinstance(group.get("lr"), Real | Tensor):
                raise MisconfigurationException(
                    "LearningRateWarmup and BatchSizeScaling need a number or a tensor as the lr of every "
                    f"parameter group, got {group.get('lr')!r} from {type(optimizer).__name__}: set one, and "
                    "disable the optimizer's own schedule (relative_step=False for Adafactor), or remove the "
                    "callbacks"
                )


class _Window(Callback):
    """Makes the adjusted values visible, or restores the plain ones, around a LearningRateMonitor."""

    def __init__(self, switch: Callable[[], None]) -> None:
        self._switch = switch

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._switch()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._switch()
