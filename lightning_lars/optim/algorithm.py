"""What an algorithm says of itself: hyperparameters, their rules, and equations.

An algorithm knows no device, no shard and no 8 bits: a back end (:mod:`lightning_lars.optim.backends`) runs
its equations, in this order, on the layers of a batch::

    d = direction(w, g, *state, *factors)  if adapts_direction()  else  measured(w, g)
    |w|, |d|                                       # whole, where layers are sharded
    |d| = averaged(|d|)                            # in an algorithm that keeps a moment of it
    trust_ratio = ratio(|w|, |d|)
    rate, *factors = factors(trust_ratio)
    d, *state = direction(w, g, *state, *factors)  # unless it is there already
    w = w - rate * d

What is the same for every algorithm comes before: ``maximize`` and ``max_grad_norm`` change ``g``, and
``decoupled_weight_decay`` changes ``w``.
"""

import math
from abc import ABC, abstractmethod
from collections import namedtuple
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lightning_lars.optim.trust_ratio import ROUNDING, Number, TrustRatios
from lightning_lars.rules import FLAG, NON_NEGATIVE, NONE_OR_FLAG, NONE_OR_POSITIVE, Rule, is_number

if TYPE_CHECKING:
    from lightning_lars.optim.backends.eager import Eager

Hyperparameters = Any
"""A named tuple of a group's hyperparameters."""

Value = Any
"""Elements: of the tensors of several layers (:class:`~lightning_lars.optim.backends.each.Each`), or of a
block on a GPU."""

PerLayer = Any
"""A number, or a tensor of shape ``(layers,)`` with one for each layer."""

Factors = tuple[PerLayer, ...]
"""The rate, which multiplies the direction, and then what :meth:`Algorithm.direction` takes."""

SHARED: dict[str, Rule] = {
    "lr": Rule(
        NON_NEGATIVE.text, lambda lr: (isinstance(lr, Tensor) or is_number(lr)) and 0 <= float(lr) < math.inf
    ),
    "weight_decay": NON_NEGATIVE,
    "decoupled_weight_decay": FLAG,
    "max_grad_norm": NONE_OR_POSITIVE,
    "maximize": FLAG,
    "fused": NONE_OR_FLAG,
    "layer_adaptation": FLAG,
}
"""What the hyperparameters of every layer-wise optimizer may be."""


class Algorithm(ABC):
    """The equations of a layer-wise optimizer, over any back end.

    ``direction`` and ``measured`` are written in ``+ - * /``, ``sqrt`` and ``if`` on hyperparameters, so that
    one text runs as torch's foreach operations and is compiled by Triton.
    """

    RULES: ClassVar[dict[str, Rule]]
    """What each hyperparameter may be."""

    moments: ClassVar[tuple[str, ...]]
    """What is kept of the size of a layer, as :meth:`direction` takes it and under torch's own names."""

    counts_steps: ClassVar[bool] = False
    """Whether the number ``t`` of a layer's steps is kept too, as ``"step"``."""

    norm_moment: ClassVar[str | None] = None
    """The name of a moment of a layer's norm, one number, which :meth:`averaged` advances."""

    cpu: ClassVar["type[Eager] | None"] = None
    """A shortcut by torch's fused kernels for the CPU."""

    state_keys: ClassVar[frozenset[str]]
    Hyperparameters: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "RULES" in cls.__dict__:
            more = (cls.norm_moment, "step" if cls.counts_steps else None)
            cls.state_keys = frozenset({*cls.moments, *filter(None, more)})
            names = [name for name in cls.RULES if name != "lr"]
            setattr(cls, "Hyperparameters", namedtuple("Hyperparameters", names))  # noqa: B010

    @classmethod
    def hyperparameters(cls, group: Mapping[str, Any]) -> Hyperparameters:
        """Return those of a group; ``weight_decay`` is 0 where the weights decay before the equations."""
        values = {name: group[name] for name in cls.Hyperparameters._fields}
        if group["decoupled_weight_decay"]:
            values["weight_decay"] = 0.0
        return cls.Hyperparameters(**values)

    @staticmethod
    def check(h: Hyperparameters) -> None:
        """Raise ValueError if hyperparameters contradict each other."""
        return

    @classmethod
    def kept(cls, h: Hyperparameters) -> tuple[str, ...]:
        """Return which of the moments are kept; in place of another, :meth:`direction` takes 0."""
        return cls.moments

    @staticmethod
    @abstractmethod
    def adapts_direction(h: Hyperparameters) -> bool:
        """Tell whether the trust ratio scales what :meth:`direction` returns, not what enters it."""

    @staticmethod
    def measured(w: Value, g: Value, h: Hyperparameters) -> Value:
        """Return what ``|w|`` is divided by the norm of, where the ratio scales what enters the direction."""
        return g

    @staticmethod
    def averaged(d_norm: Tensor, moment: Tensor, h: Hyperparameters) -> Tensor:
        """Return the new :attr:`norm_moment`, 0 at first, which :meth:`ratio` takes for ``d_norm``."""
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def ratio(w_norm: Number, d_norm: Number, lr: Any, h: Hyperparameters) -> TrustRatios[Number]:
        """Return the trust ratio of one layer in floats, or of several in tensors of shape ``(layers,)``."""

    @staticmethod
    @abstractmethod
    def factors(ratio: PerLayer, lr: PerLayer, is_first: bool, t: PerLayer, h: Hyperparameters) -> Factors:
        """Return the rate, which multiplies the direction, and then what :meth:`direction` takes.

        Args:
            ratio: The trust ratio; 1 before it is known, and without ``layer_adaptation``.
            lr: The learning rate.
            is_first: Whether this is the first step of these layers.
            t: The number of this step, where the algorithm counts them.
            h: Hyperparameters.
        """

    @staticmethod
    @abstractmethod
    def direction(w: Value, g: Value, *state_factors_and_h: Any) -> tuple[Value, ...]:
        """Return the direction that the weights descend along, and the moments after it.

        ``w`` is 0 where nothing decays: as a factor of 0 would make NaN of a weight that is not finite.
        """

    @staticmethod
    def decay_alone(h: Hyperparameters) -> tuple[float, float]:
        """Return least and most of ``denominator / |w|`` where weight decay is all that moves a layer."""
        return (1 - ROUNDING) * h.weight_decay, (1 + ROUNDING) * h.weight_decay
