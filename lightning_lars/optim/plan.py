"""The setup of a step, reused by later steps whose layers are unchanged."""

from collections.abc import Mapping, Sequence
from itertools import chain, compress, islice
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor

from lightning_lars.optim.algorithm import Hyperparameters
from lightning_lars.optim.backends.eager import Eager
from lightning_lars.optim.backends.triton_table import current_stream, is_capturing
from lightning_lars.optim.batches import Batch
from lightning_lars.optim.state.plain import PlainState, States


class Unchanged(NamedTuple):
    """Layers of which only the values and the addresses of the gradients have changed."""

    grads: list[Tensor]
    """The gradient of each layer."""

    addresses: list[int]
    """The address of each gradient."""

    modified: list[Tensor]
    """The tensors that a step writes to."""

    hyperparameters: Sequence[Hyperparameters]
    """The current hyperparameters of each group."""


class Plan:
    """The back ends of a step, set up for their layers, and everything that this setup depends on.

    To check that a layer is unchanged takes a microsecond, to set it up again ten.

    Args:
        groups: The parameter groups of the optimizer.
        hyperparameters: The hyperparameters of each group.
        states: The state of each layer, by parameter.
        state: How the state is stored between steps.
        backends: Back ends that can repeat a step, in the order of their batches, on layers that are not
            sharded and not in their first step.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        hyperparameters: Sequence[Hyperparameters],
        states: States,
        state: PlainState,
        backends: Sequence[Eager],
    ) -> None:
        self.backends, self._state = backends, state
        self._groups = [
            _KnownGroup(group, list(group["params"]), h)
            for group, h in zip(groups, hyperparameters, strict=True)
        ]
        numbers = {id(group): number for number, group in enumerate(groups)}
        self._numbers = [numbers[id(backend.batch.group)] for backend in backends]
        self._moving = [p for backend in backends for p in backend.batch.params]
        moving = set(self._moving)
        self._resting = [p for known in self._groups for p in known.params if p not in moving]
        self._stateful = list(states)
        self._has_moved = [p in moving for p in self._stateful]
        moved = list(compress(states.values(), self._has_moved))
        self._keys = list(chain.from_iterable(moved))
        modified = [*self._moving, *state.tensors(moved)]
        grads = [grad for backend in backends for grad in backend.batch.grads]
        self._addresses = list(map(Tensor.data_ptr, modified))
        self._gradient_addresses = list(map(Tensor.data_ptr, grads))
        self._streams = {p.device: current_stream(p.device) for p in self._moving}
        # The guards of torch.compile check class, device, dtype, shape and strides of a tensor in a third of
        # the time of Python code. They are private.
        from torch._C._dynamo.guards import TensorGuards

        shapes: Any = [list(tensor.shape) for tensor in (*modified, *grads)]
        strides: Any = [list(tensor.stride()) for tensor in (*modified, *grads)]
        self._kinds = TensorGuards(*modified, *grads, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)

    def unchanged(
        self,
        groups: Sequence[dict[str, Any]],
        hyperparameters: Sequence[Hyperparameters],
        states: States,
    ) -> Unchanged | None:
        """Return the layers of a step if nothing but values and gradient addresses has changed, else None."""
        if len(groups) != len(self._groups):
            return None
        for group, h, known in zip(groups, hyperparameters, self._groups, strict=True):
            if not known.has_same_rules(group, h):
                return None
        if any(
            is_capturing(device) or current_stream(device) != stream
            for device, stream in self._streams.items()
        ):
            return None
        grads: list[Any] = [p.grad for p in self._moving]
        if any(p.grad is not None for p in self._resting) or not _are_same(states, self._stateful):
            return None
        moved = list(compress(states.values(), self._has_moved))
        if list(chain.from_iterable(moved)) != self._keys:
            return None
        modified = [*self._moving, *self._state.tensors(moved)]
        if not self._kinds.check(*modified, *grads):
            return None
        if list(map(Tensor.data_ptr, modified)) != self._addresses:
            return None
        return Unchanged(grads, list(map(Tensor.data_ptr, grads)), modified, hyperparameters)

    def batches(self, found: Unchanged) -> list[Batch]:
        """Return the batches of a step, with the current hyperparameters of their groups."""
        rest = iter(found.grads)
        return [
            backend.batch._replace(
                h=found.hyperparameters[number], grads=list(islice(rest, len(backend.batch.params)))
            )
            for backend, number in zip(self.backends, self._numbers, strict=True)
        ]

    def begin(self, batches: Sequence[Batch], found: Unchanged) -> Sequence[Eager]:
        """Begin the step of these batches, and return the back ends."""
        start = 0
        for backend, batch in zip(self.backends, batches, strict=True):
            own = slice(start, start + len(batch.params))
            start = own.stop
            if found.addresses[own] != self._gradient_addresses[own]:
                backend.find_gradients(found.addresses[own])
            backend.begin(batch)
        self._gradient_addresses = found.addresses
        return self.backends


class _KnownGroup:
    """A parameter group, and those of its options that determine batches and back ends."""

    def __init__(self, group: dict[str, Any], params: list[Tensor], h: Hyperparameters) -> None:
        self.group, self.params = group, params
        self._h = h
        self._rules = self._rules_of(group, self._h)

    def has_same_rules(self, group: Mapping[str, Any], h: Hyperparameters) -> bool:
        """Return whether this is the group, with the same parameters and options."""
        if group is not self.group or not _are_same(group["params"], self.params):
            return False
        if h == self._h and group.get("min_8bit_size") == self._rules[-1]:
            return True
        if self._rules_of(group, h) != self._rules:
            return False
        self._h = h
        return True

    @staticmethod
    def _rules_of(group: Mapping[str, Any], h: Hyperparameters) -> tuple[Any, ...]:
        """Return the options that determine batches and back ends, with numbers as 0 or not 0."""
        return (*map(_sort_of, h), group.get("min_8bit_size"))


def _sort_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_sort_of, value))
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    return ("number", value != 0) if is_number else value


def _are_same(tensors: Any, others: Sequence[Any]) -> bool:
    return len(tensors) == len(others) and all(map(is_, tensors, others))
