"""What :func:`~lightning_lars.advise` returns."""

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CriticalBatchSize:
    """The gradient noise scale, as it was measured."""

    b_simple: float | None
    """``tr_sigma / squared_gradient``, in samples, over about the last third of the steps; None where one is
    lost in the other."""
    standard_error: float | None
    """Of ``b_simple``, to first order."""
    tr_sigma: float
    """Trace of the covariance of the gradient of one sample."""
    squared_gradient: float
    """Squared norm of the gradient without noise."""
    batch_size: int
    """Effective batch size of the steps that were measured."""
    history: tuple[tuple[int, float | None], ...]
    """Pairs of a step and ``b_simple`` until then, evenly spaced."""


@dataclass(frozen=True)
class StartingPoint:
    """Hyperparameters to start a search from."""

    lr: float
    excluded_lr: float
    """The learning rate of norms and biases."""
    weight_decay: float


@dataclass(frozen=True)
class BatchSize:
    """What to expect of a batch size, and what to try there."""

    batch_size: int
    """Effective batch size, in samples."""
    steps_factor: float | None
    """Optimizer steps to the same loss, over those at the module's own batch size; None if not measured."""
    samples_factor: float | None
    """The same of the samples."""
    steps: int | None
    """The steps, where the Trainer knows how many its run takes."""
    samples: int | None
    """The samples."""
    lr_sqrt: float | None
    """The module's own learning rate by the square-root rule; None for optimizers without a rate."""
    lr_linear: float | None
    """By the linear rule; None for optimizers for which it has no source."""
    lars: StartingPoint
    """The starting point of :func:`lightning_lars.recipes.lars`."""
    lamb: StartingPoint
    """The starting point of :func:`lightning_lars.recipes.lamb`."""


@dataclass(frozen=True)
class ParameterGroup:
    """A parameter group of the module's optimizer, or the parameters that are in none."""

    name: str
    tensors: int
    elements: int
    lr: float | None
    """The peak of its learning rate, without the factors of callbacks; None where it has none."""
    weight_decay: float | None
    layer_adaptation: bool | None
    """Whether LARS or LAMB adapts its layers; None for other optimizers."""


@dataclass(frozen=True)
class Advice:
    """What a short run at a small batch size tells about larger ones.

    Example:
        >>> from lightning_lars.advice.report import Advice
        >>> print(Advice.__dataclass_fields__["unknown"].type)
        tuple[str, ...]
    """

    optimizer: str
    """Class name of the module's optimizer."""
    batch_size: int
    """Effective batch size of the module's own Trainer."""
    base_batch_size: int
    """The batch size that the module's learning rate is for, that of ``BatchSizeScaling`` or the same."""
    measured_steps: int
    """Optimizer steps of the short run."""
    steps: int | None
    """Optimizer steps of the whole run at the module's own batch size; None where it has no end."""
    critical: CriticalBatchSize | None
    """None if nothing was measured."""
    suggested_batch_size: int | None
    """The multiple of ``batch_size`` by a power of 2 that is closest to the critical one, at least
    ``batch_size`` itself; None if nothing was measured."""
    batch_sizes: tuple[BatchSize, ...]
    """Multiples of ``batch_size`` by powers of 2."""
    groups: tuple[ParameterGroup, ...]
    parameter_bytes: int
    """Bytes of the parameters that are trained."""
    state_bytes: dict[str, int]
    """Bytes of the optimizer's state on one device, of the module's own as it was after the run, and of
    others."""
    unusual: tuple[str, ...]
    """What is unusual in the groups, in sentences."""
    unknown: tuple[str, ...]
    """What this advice does not know, in sentences."""

    def print(self) -> None:
        """Print the advice as tables, to ``rich.get_console()``."""
        import rich

        from lightning_lars.advice.table import print_advice

        print_advice(rich.get_console(), self)

    def to_json(self) -> str:
        """Return the advice as JSON, with the names of the attributes as keys."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Advice":
        """Return the advice that :meth:`to_json` has written.

        Raises:
            TypeError: If a key is missing or unknown.
        """
        values: dict[str, Any] = json.loads(text)
        critical = values["critical"]
        if critical is not None:
            history = tuple((step, b_simple) for step, b_simple in critical["history"])
            values["critical"] = CriticalBatchSize(**{**critical, "history": history})
        values["batch_sizes"] = tuple(
            BatchSize(**{**each, **{key: StartingPoint(**each[key]) for key in ("lars", "lamb")}})
            for each in values["batch_sizes"]
        )
        values["groups"] = tuple(ParameterGroup(**each) for each in values["groups"])
        values |= {key: tuple(values[key]) for key in ("unusual", "unknown")}
        return cls(**values)
