"""The state of layers that have left the groups of an optimizer."""

from collections.abc import Collection, MutableMapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class AbsentState:
    """Keeps the state of layers in no group apart: there again when they are, gone when they are gone.

    A group may change without ``add_param_group``: pruning and growing put other parameters into it, some
    training loops step a part of the groups at a time. ``torch.optim`` leaves the state of what has gone in
    ``optimizer.state``, where it stays in memory and makes ``state_dict()`` fail.

    Example:
        >>> import torch
        >>> from lightning_lars.optim.state.absent import AbsentState
        >>> kept, pruned = torch.ones(2), torch.ones(3)
        >>> state, absent = {kept: "momentum", pruned: "another"}, AbsentState()
        >>> absent.follow(state, [kept])
        >>> list(state.values())
        ['momentum']
        >>> absent.follow(state, [kept, pruned])
        >>> list(state.values())
        ['momentum', 'another']
    """

    def __init__(self) -> None:
        self._states = WeakTensorKeyDictionary()

    def follow(self, state: MutableMapping[Any, Any], params: Collection[Tensor]) -> None:
        """Move out of the state what is of no parameter, and back into it what is of one again."""
        present = set(params)
        for p in [key for key in state if isinstance(key, Tensor) and key not in present]:
            self._states[p] = state.pop(p)
        for p in [p for p in self._states if p in present]:
            state.setdefault(p, self._states[p])
            del self._states[p]
