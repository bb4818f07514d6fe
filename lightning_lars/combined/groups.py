"""Which optimizer holds which group and parameter, where several are one."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_lars.optim.parameters import named_params


def params_of(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    """Yield all parameters of the optimizers."""
    for each in optimizers:
        for group in each.param_groups:
            yield from group["params"]


def common_defaults(optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Return the hyperparameters that all have: what schedulers ask for, such as ``momentum``."""
    first, *others = (each.defaults for each in optimizers)
    return {key: value for key, value in first.items() if all(key in other for other in others)}


def hand_out(groups: Sequence[dict[str, Any]], optimizers: Sequence[Optimizer]) -> None:
    """Give every optimizer the groups of its parameters, as a callback may have split them.

    Raises:
        RuntimeError: If the parameters of a group belong to several optimizers, or to none.
    """
    holder = {id(p): each for each in optimizers for p in params_of([each])}
    of_group = {id(group): each for each in optimizers for group in each.param_groups}
    handed: dict[int, list[dict[str, Any]]] = {id(each): [] for each in optimizers}
    for index, group in enumerate(groups):
        holders = {id(holder.get(id(p))) for p in group["params"]}
        if id(group) in of_group:
            holders = {id(of_group[id(group)])}
        if len(holders) != 1 or not holders <= handed.keys():
            raise RuntimeError(
                f"param_groups must hold groups of one optimizer's parameters each, got "
                f"{group.get('name', f'group {index}')!r} with those of {len(holders)} or of none: use "
                "add_param_group(group, to=optimizer.optimizers[...]) for new parameters"
            )
        handed[holders.pop()].append(group)
    for each in optimizers:
        each.param_groups[:] = handed[id(each)]


def check_fit(optimizers: Sequence[Any]) -> None:
    """Raise unless these are optimizers that can be one: of different parameters, without a closure.

    Raises:
        TypeError: If one is no ``torch.optim`` optimizer.
        ValueError: If there is none, if two hold the same parameter, or if one needs a closure.
    """
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise TypeError(f"optimizers must be torch.optim optimizers, got {each!r}")
        closure = inspect.signature(each.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(
                f"optimizers must step without a closure, got {type(each).__name__}, which evaluates it "
                "several times: the gradients of the others would change meanwhile"
            )
    if not optimizers:
        raise ValueError("optimizers must hold at least one, got none")
    holder: dict[int, Optimizer] = {}
    for each in optimizers:
        for name, p in named_params(each.param_groups):
            if id(p) in holder:
                raise ValueError(
                    f"optimizers must have no parameter in common, got {name!r} in "
                    f"{type(holder[id(p)]).__name__} and in {type(each).__name__}"
                )
            holder[id(p)] = each
