"""The interface of an algorithm: its hyperparameters, their rules and its equations.

An algorithm is independent of devices, sharding and 8-bit state. A back end
(:mod:`lightning_lars.optim.backends`) evaluates its equations on the layers of a batch, in this order::

    d = direction(w, g, *state, *factors)  if adapts_direction()  else  denominator_vector(w, g)
    |w|, |d|                                       # over all shards of a layer
    |d| = next_norm_moment(|d|)                    # if the algorithm averages the norm over steps
    trust_ratio = ratio(|w|, |d|)
    rate, *factors = factors(trust_ratio)
    d, *state = direction(w, g, *state, *factors)  # unless computed above
    w = w - rate * d

Options that all algorithms share act before these equations: ``maximize`` and ``max_grad_norm`` on ``g``,
``decoupled_weight_decay`` on ``w``.
"""

import math
from abc import ABC, abstractmethod
from collections import namedtuple
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightning_lars.optim.trust_ratio import ROUNDING, Number, TrustRatios
from lightning_lars.rules import FLAG, NON_NEGATIVE, NONE_OR_FLAG, NONE_OR_POSITIVE, Rule, is_number

Hyperparameters = Any
"""The hyperparameters of a parameter group, as a named tuple."""

Value = Any
"""The tensors of several layers (:class:`~lightning_lars.optim.backends.tensor_list.TensorList`), or a block
of elements in a GPU kernel."""

PerLayer = Any
"""A number, or a tensor of shape ``(layers,)`` with one number for each layer."""

Factors = tuple[PerLayer, ...]
"""The rate, which multiplies the direction, and the factors that :meth:`Algorithm.direction` takes."""

# Schedules that end at 0, such as torch's LinearLR, miss it by rounding.
_ROUNDING_OF_RATES = 1e-12

LEARNING_RATE = Rule(
    NON_NEGATIVE.text,
    lambda lr: (isinstance(lr, Tensor) or is_number(lr)) and -_ROUNDING_OF_RATES <= float(lr) < math.inf,
)

COMMON_RULES: dict[str, Rule] = {
    "lr": LEARNING_RATE,
    "weight_decay": NON_NEGATIVE,
    "decoupled_weight_decay": FLAG,
    "max_grad_norm": NONE_OR_POSITIVE,
    "maximize": FLAG,
    "fused": NONE_OR_FLAG,
    "layer_adaptation": FLAG,
}
"""Rules for the hyperparameters that all layer-wise optimizers share."""

# A tuple, as torch.compile of torch 2.7 cannot trace a set of types.
_OF_PYTHON = (float, bool, type(None), int, str)


class Algorithm(ABC):
    """The equations of a layer-wise optimizer, independent of the back end.

    ``direction`` and ``denominator_vector`` use only ``+ - * /``, ``sqrt`` and ``if`` on hyperparameters, so
    that the same source runs as torch's foreach operations and is compiled by Triton.
    """

    RULES: ClassVar[dict[str, Rule]]
    """The rule for each hyperparameter."""

    moments: ClassVar[tuple[str, ...]]
    """State tensors in the shape of the layer, in the order :meth:`direction` takes them, by torch's keys."""

    counts_steps: ClassVar[bool] = False
    """Whether the state also counts the steps ``t`` of a layer, as ``"step"``."""

    norm_moment: ClassVar[str | None] = None
    """State key of a scalar moving average of the layer's norm, which :meth:`next_norm_moment` updates."""

    cpu: ClassVar[type[Any] | None] = None
    """The back end on torch's fused CPU kernels, a subclass of ``Eager``, if the algorithm has one."""

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
        """Return the hyperparameters of a group, with ``weight_decay`` 0 if the decay is decoupled.

        Lists become tuples, so that they are those of this step if the lists change in place, and NumPy's
        numbers those of Python, which kernels can be compiled for.
        """
        names = cls.Hyperparameters._fields
        given = [group[name] for name in names]
        # In every step, where a call for each costs as much as all else here.
        values = [value if type(value) in _OF_PYTHON else _of_python(value) for value in given]
        if group["decoupled_weight_decay"]:
            values[names.index("weight_decay")] = 0.0
        return cls.Hyperparameters(*values)

    @staticmethod
    def check_combination(h: Hyperparameters) -> None:
        """Raise ValueError if hyperparameters that are valid one by one contradict each other."""
        return

    @classmethod
    def used_moments(cls, h: Hyperparameters) -> tuple[str, ...]:
        """Return the moments that are in use; :meth:`direction` takes 0 in place of the others."""
        return cls.moments

    @staticmethod
    @abstractmethod
    def adapts_direction(h: Hyperparameters) -> bool:
        """Return whether the trust ratio scales the direction, not the gradient that goes into it."""

    @staticmethod
    def denominator_vector(w: Value, g: Value, h: Hyperparameters) -> Value:
        """Return the vector whose norm is ``|d|``, where the trust ratio does not scale the direction."""
        return g

    @staticmethod
    def next_norm_moment(d_norm: Tensor, moment: Tensor, h: Hyperparameters) -> Tensor:
        """Return the updated :attr:`norm_moment`, which starts at 0; :meth:`ratio` takes it as ``d_norm``."""
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def ratio(w_norm: Number, d_norm: Number, lr: Any, h: Hyperparameters) -> TrustRatios[Number]:
        """Return the trust ratio of one layer as floats, or of several as tensors of shape ``(layers,)``."""

    @staticmethod
    @abstractmethod
    def factors(ratio: PerLayer, lr: PerLayer, is_first: bool, t: PerLayer, h: Hyperparameters) -> Factors:
        """Return the rate, which multiplies the direction, and the factors that :meth:`direction` takes.

        Args:
            ratio: The trust ratio; 1 before it is known and without ``layer_adaptation``.
            lr: The learning rate.
            is_first: Whether this is the first step of these layers.
            t: The number of this step, from 1, if the algorithm counts steps.
            h: The hyperparameters of the group.
        """

    @staticmethod
    @abstractmethod
    def direction(w: Value, g: Value, *state_factors_and_h: Any) -> tuple[Value, ...]:
        """Return the direction, along which the weights descend, and the updated moments.

        ``w`` is the number 0 without weight decay: 0 times a weight that is not finite would be NaN.
        """

    @staticmethod
    def decay_only_bounds(h: Hyperparameters) -> tuple[float, float]:
        """Return the bounds of ``denominator / |w|`` for a layer that only weight decay moves."""
        return (1 - ROUNDING) * h.weight_decay, (1 + ROUNDING) * h.weight_decay


def _of_python(value: Any) -> Any:
    if type(value) in _OF_PYTHON:
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_of_python, value))
    return value.item() if is_number(value) and hasattr(value, "item") else value
