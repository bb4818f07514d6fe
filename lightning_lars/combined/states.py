"""The states of several optimizers as one mapping."""

from collections.abc import Iterator, MutableMapping, Sequence
from itertools import chain
from typing import Any

from torch.optim import Optimizer


class States(MutableMapping[Any, Any]):
    """The state of every parameter, read from and written to the optimizer that holds the parameter.

    Like the ``state`` of one optimizer, it has an empty state for a parameter that has none yet.

    Args:
        optimizers: The optimizers, which hold different parameters.

    Example:
        >>> import torch
        >>> from lightning_lars.combined.states import States
        >>> v, w = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        >>> first, second = torch.optim.SGD([v], lr=0.1), torch.optim.Adam([w])
        >>> states = States([first, second])
        >>> states[w]["step"] = 3
        >>> second.state[w], len(states)
        ({'step': 3}, 1)
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def __getitem__(self, key: Any) -> Any:
        return self._holding(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._holding(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._holding(key)[key]

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(each.state for each in self._optimizers)

    def __len__(self) -> int:
        return sum(len(each.state) for each in self._optimizers)

    def __contains__(self, key: object) -> bool:
        return any(key in each.state for each in self._optimizers)

    def __repr__(self) -> str:
        return repr(dict(self.items()))

    def _holding(self, key: Any) -> MutableMapping[Any, Any]:
        for each in self._optimizers:
            if key in each.state:
                return each.state
        for each in self._optimizers:
            if any(p is key for group in each.param_groups for p in group["params"]):
                return each.state
        raise KeyError(key)
