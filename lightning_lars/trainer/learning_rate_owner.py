"""The one callback of a Trainer that adjusts learning rates, on behalf of those that ask it to."""

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
from lightning_lars.groups.param_groups import check_holds_parameters
from lightning_lars.learning_rate.step_factors import LearningRateFactors
from lightning_lars.trainer.callback import Callback
from lightning_lars.trainer.training_length import Beginning

Factor = Callable[[Mapping[str, Any], int], Mapping[str, Any]]
"""Maps a group and the number of the step about to be taken, from 1, to the values it has in that step."""


class LearningRateOwner(Callback):
    """Lets callbacks change hyperparameters inside a step, in turn, and counts the steps that happened.

    Inserts itself at the head of the Trainer's callbacks, so that checkpoints hold its count, and a window
    around every ``LearningRateMonitor``, so that it logs what the steps use.
    """

    def __init__(self) -> None:
        self._factors: dict[str, Factor] = {}
        self._optimizers: dict[str, LearningRateFactors] = {}
        self._followed: list[Any] = []
        self._steps: list[int] = []
        self._beginning = Beginning(epoch=0, step=0)
        self._has_trained = False

    @classmethod
    def of(cls, trainer: Trainer, asking: Callback) -> "LearningRateOwner":
        """Return the owner of a Trainer, after putting it there. To be called in ``setup``.

        The callback that asks is moved behind the owner, to know of a batch before any monitor does.
        """
        callbacks = cast(Any, trainer).callbacks
        owner = next((callback for callback in callbacks if isinstance(callback, cls)), None) or cls()
        arranged: list[Any] = [owner, asking]
        for callback in callbacks:
            if callback is asking or isinstance(callback, LearningRateOwner | _Window):
                continue
            if has_class_named(callback, "LearningRateMonitor"):
                arranged += [_Window(owner.open), callback, _Window(owner.close)]
            else:
                arranged.append(callback)
        # A new list: Lightning is iterating over the old one while it calls `setup`.
        cast(Any, trainer).callbacks = arranged
        return owner

    def adjust(self, name: str, factor: Factor) -> None:
        """Apply a factor from the next step on. To be called in ``on_train_start``.

        Raises:
            MisconfigurationException: If the name is taken: two callbacks would do the same thing twice.
        """
        if name in self._factors:
            raise MisconfigurationException(
                f"The Trainer has two callbacks for the {name} of the learning rate: leave one out"
            )
        self._factors[name] = factor

    @property
    def steps(self) -> list[int]:
        """The steps of every optimizer that happened since its training began."""
        return [factors.steps.taken for factors in self._optimizers.values()] or self._steps

    @property
    def beginning(self) -> Beginning:
        """Where the Trainer stood as the optimizers began: a second fit builds new ones."""
        return self._beginning

    def open(self) -> None:
        """Show the adjusted values outside of a step."""
        for factors in self._optimizers.values():
            factors.apply()

    def close(self) -> None:
        """Hide them again."""
        for factors in self._optimizers.values():
            factors.restore()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Every fit has new optimizers. The count of a checkpoint is loaded after this.
        if stage == "fit":
            self._steps, self._beginning = [], Beginning(epoch=0, step=0)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        self._follow(trainer, pl_module)
        is_resumed = cast(Any, trainer).ckpt_path is not None
        if len(self._steps) != len(self._optimizers):
            # A checkpoint from before this callback was there: Lightning's own count is the best known.
            steps = trainer.global_step if is_resumed else 0
            self._steps = [steps // max(1, len(self._optimizers))] * len(self._optimizers)
        if not is_resumed:
            self._beginning = Beginning(trainer.current_epoch, trainer.global_step)
        for factors, taken in zip(self._optimizers.values(), self._steps, strict=True):
            factors.steps.taken = taken

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if [*map(id, self._followed)] != [*map(id, trainer.optimizers)]:
            # Set up anew in the middle of a fit: what is new begins with its first step.
            self._follow(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._has_trained = True
        # A step that failed, and whose exception was caught, has left its values behind.
        self.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Here, as the module's hooks, up to the last, may step.
        for name, factors in self._optimizers.items():
            if self._has_trained and factors.steps.taken == 0:
                rank_zero_warn(
                    f"{', '.join(self._factors)} of the learning rate had no effect on {name}, which took no "
                    "step that counts: optimizer.step(), during fit, with a gradient, and not skipped by a "
                    "gradient scaler"
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
        for factors, taken in zip(self._optimizers.values(), self._steps, strict=False):
            factors.steps.taken = taken

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adjust the optimizers that the Trainer has now; those that it had go on."""
        _check(trainer.optimizers)
        known = dict(zip(map(id, self._followed), self._optimizers.values(), strict=True))
        # What is refused ends the fit, which leaves those that are held here by then.
        self._optimizers, self._followed = {}, list(trainer.optimizers)
        for name, optimizer in by_name(trainer.optimizers).items():
            factors = known.pop(id(optimizer), None) or self._factors_of(optimizer, trainer)
            self._optimizers[name.strip("/") or type(optimizer).__name__] = factors
            # DeepSpeed wraps the optimizer in something that is none, and has other parameters.
            if isinstance(optimizer, Optimizer):
                check_holds_parameters(optimizer, trainer.model or pl_module)
        for factors in known.values():
            factors.detach()

    def _factors_of(self, optimizer: Any, trainer: Trainer) -> LearningRateFactors:
        try:
            # The tuner sets callbacks aside while it tries rates and batch sizes in the middle of a fit.
            return LearningRateFactors(optimizer, self._adjustment, counts=lambda: _is_among(self, trainer))
        except TypeError as error:
            raise MisconfigurationException(
                f"LearningRateWarmup and BatchSizeScaling act inside of optimizer.step(), and {error}: "
                "put the factor into the schedule (WarmupDecayLR), or leave the callbacks out"
            ) from error

    def _adjustment(self, group: Mapping[str, Any], step: int) -> Mapping[str, Any]:
        adjusted: dict[str, Any] = {}
        for factor in self._factors.values():
            adjusted |= factor({**group, **adjusted}, step)
        return adjusted

    def _detach(self) -> None:
        # A checkpoint may be written after it.
        self._steps = list(self.steps)
        for factors in self._optimizers.values():
            factors.detach()
        self._optimizers, self._followed, self._factors, self._has_trained = {}, [], {}, False


def _is_among(callback: Callback, trainer: Trainer) -> bool:
    return torch.compiler.is_compiling() or any(callback is each for each in cast(Any, trainer).callbacks)


def _check(optimizers: Sequence[Any]) -> None:
    """Raise if there is no optimizer, or one without a learning rate to multiply."""
    # Lightning puts an empty optimizer in the place of none.
    if not any(optimizer.param_groups for optimizer in optimizers):
        raise MisconfigurationException(
            "LearningRateWarmup and BatchSizeScaling need an optimizer with a learning rate, and "
            "configure_optimizers returned none: leave the callbacks out"
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not isinstance(group.get("lr"), Real | Tensor):
                raise MisconfigurationException(
                    "LearningRateWarmup and BatchSizeScaling need a number or a tensor as the lr of every "
                    f"parameter group, got {group.get('lr')!r} from {type(optimizer).__name__}: give it one, "
                    "and turn off what it computes instead (relative_step=False for Adafactor), or leave the "
                    "callbacks out"
                )


class _Window(Callback):
    """Opens or closes the view on the adjusted values where a LearningRateMonitor reads them."""

    def __init__(self, move: Callable[[], None]) -> None:
        self._move = move

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._move()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._move()
