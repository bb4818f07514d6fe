"""The parts of advice: what was measured, and what it means for batch sizes and groups."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CriticalBatchSize:
    """The gradient noise scale, as it was measured."""

    b_simple: float | None
    """``tr_sigma / squared_gradient``, in samples, over about the last third of the steps; None where one
    of the two is not above 0, and so lost in the other."""
    standard_error: float | None
    """Standard error of ``b_simple``, to first order, in samples; None where it cannot be estimated."""
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
    """The same for samples."""
    steps: int | None
    """Optimizer steps to the same loss; None if not measured, or if the length of the run is unknown."""
    samples: int | None
    """Samples to the same loss; None as for ``steps``."""
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
    """Number of parameter tensors."""
    elements: int
    """Number of their elements; 0 for a lazy one."""
    lr: float | None
    """The peak of its learning rate, without the factors of callbacks; None where it has none."""
    weight_decay: float | None
    layer_adaptation: bool | None
    """Whether LARS or LAMB adapts its layers; None for other optimizers."""
