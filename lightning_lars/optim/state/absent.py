"""The state of parameters that have left the groups of an optimizer."""

from collections.abc import Collection, MutableMapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class AbsentState:
    """Sets aside the state of parameters that are in no group, until they return or are garbage-collected.

    Groups may change without ``add_param_group``: pruning and growing replace parameters, and some training
    loops step only some of the groups at a time. ``torch.optim`` leaves the state of removed parameters in
    ``optimizer.state``, where it occupies memory and makes ``state_dict()`` fail.

    Example:
        >>> import torch
        >>> from lightning_lars.optim.state.absent import AbsentState
        >>> kept, pruned = torch.ones(2), torch.ones(3)
        >>> state, absent = {kept: "its state", pruned: "another"}, AbsentState()
        >>> absent.follow(state, [kept])
        >>> list(state.values())
        ['its state']
        >>> absent.follow(state, [kept, pruned])
        >>> list(state.values())
        ['its state', 'another']
    """

    def __init__(self) -> None:
        self._states = WeakTensorKeyDictionary()

    def follow(self, state: MutableMapping[Any, Any], params: Collection[Tensor]) -> None:
        """Set aside the state of all parameters but these, and restore theirs if it was set aside."""
        present = set(params)
        for p in [key for key in state if isinstance(key, Tensor) and key not in present]:
            self._states[p] = state.pop(p)
        for p in [p for p in self._states if p in present]:
            state.setdefault(p, self._states[p])
            del self._states[p]
