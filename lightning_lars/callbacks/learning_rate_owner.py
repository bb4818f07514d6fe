"""The one callback of a Trainer that adjusts learning rates, on behalf of those that ask it to."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lars.callbacks.both_roots import Callback
from lightning_lars.learning_rate_factors import LearningRateFactors
from lightning_lars.param_groups import check_holds_parameters

Factor = Callable[[Mapping[str, Any], int], Mapping[str, Any]]
"""Maps a group and the number of the step about to be taken, from 1, to the values it has in that step."""


class LearningRateOwner(Callback):
    """Lets callbacks change hyperparameters inside a step, in turn, and counts the steps that happened.

    Inserts itself at the head of the Trainer's callbacks, so that checkpoints hold its count, and a window
    around every ``LearningRateMonitor``, so that it logs what the steps use.
    """

    def __init__(self) -> None:
        self._factors: dict[str, Factor] = {}
        self._optimizers: list[LearningRateFactors] = []
        self._steps: list[int] = []
        self._before_batch: list[int] = []
        self._automatic = True

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
            if any(base.__name__ == "LearningRateMonitor" for base in type(callback).__mro__):
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

    def open(self) -> None:
        """Show the adjusted values outside of a step."""
        for optimizer in self._optimizers:
            optimizer.apply()

    def close(self) -> None:
        """Hide them again."""
        for optimizer in self._optimizers:
            optimizer.restore()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Every fit has new optimizers. The count of a checkpoint is loaded after this.
        if stage == "fit":
            self._steps = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        self._automatic = pl_module.automatic_optimization
        if not any("lr" in group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            raise MisconfigurationException(
                "LearningRateWarmup and BatchSizeScaling need an optimizer with a learning rate, and "
                "configure_optimizers returned none: leave the callbacks out"
            )
        for index, optimizer in enumerate(trainer.optimizers):
            # DeepSpeed wraps the optimizer in something that is none, has no hooks, and other parameters.
            wrapped = not isinstance(optimizer, Optimizer)
            inner = cast(Any, optimizer).optimizer if wrapped else optimizer
            if not wrapped:
                check_holds_parameters(inner, trainer.model or pl_module)
            self._optimizers.append(LearningRateFactors(inner, self._adjustment_of(index)))
        if len(self._steps) != len(self._optimizers):
            # A checkpoint from before this callback was there: Lightning's own count is the best known.
            steps = trainer.global_step if cast(Any, trainer).ckpt_path else 0
            self._steps = [steps // max(1, len(self._optimizers))] * len(self._optimizers)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # What DCP steps while it loads or saves an optimizer is outside of a batch and does not count.
        self._before_batch = [optimizer.steps for optimizer in self._optimizers]

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._count()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": [self._taken(index) for index in range(len(self._steps))]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = list(state_dict["steps"])

    def _adjustment_of(self, index: int) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
        def adjustment(group: Mapping[str, Any]) -> Mapping[str, Any]:
            # The calls of DeepSpeed, one a group, are of the same step.
            step = (self._steps[index] if self._automatic else self._taken(index)) + 1
            adjusted: dict[str, Any] = {}
            for factor in self._factors.values():
                adjusted |= factor({**group, **adjusted}, step)
            return adjusted

        return adjustment

    def _taken(self, index: int) -> int:
        """Return the number of steps of an optimizer that happened."""
        if not self._before_batch:
            return self._steps[index]
        in_batch = self._optimizers[index].steps - self._before_batch[index]
        # DeepSpeed calls the inner optimizer once a group: automatic optimization steps once a batch.
        return self._steps[index] + (min(1, in_batch) if self._automatic else in_batch)

    def _count(self) -> None:
        """Add what the batch at hand has stepped."""
        self._steps = [self._taken(index) for index in range(len(self._steps))]
        self._before_batch = []

    def _detach(self) -> None:
        # An exception leaves in the middle of a batch, and a checkpoint may be written after it.
        self._count()
        for optimizer in self._optimizers:
            optimizer.detach()
        self._optimizers = []
        self._factors = {}


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
