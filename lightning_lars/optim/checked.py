"""The hyperparameters of a step, checked where they have changed since the last one."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import LEARNING_RATE, Algorithm, Hyperparameters
from lightning_lars.rules import Rule, check, require


class CheckedHyperparameters:
    """The hyperparameters of the groups of an optimizer, all of which have kept to their rules.

    Groups are dicts that schedulers and training loops write to. To see that nothing has changed takes a
    microsecond for each group, to check all rules ten.
    """

    def __init__(self) -> None:
        self._last: list[Hyperparameters] = []
        self._more: list[Any] = []

    def of(
        self,
        groups: Sequence[dict[str, Any]],
        algorithm: type[Algorithm],
        more_rules: Mapping[str, Rule],
        defaults: Mapping[str, Any],
    ) -> list[Hyperparameters]:
        """Return the hyperparameters of each group, the same list as in the last step if none has changed.

        Args:
            groups: The parameter groups of the optimizer. Those that were replaced get the default values of
                what they lack.
            algorithm: The algorithm of the optimizer.
            more_rules: Rules for hyperparameters that the algorithm does not have.
            defaults: The default values.

        Raises:
            ValueError: If a hyperparameter breaks its rule.
        """
        if torch.compiler.is_compiling():  # which would guard every value
            _complete(groups, defaults)
            return [algorithm.hyperparameters(group) for group in groups]
        try:
            current, rates, more = _read(groups, algorithm, more_rules)
        except KeyError:
            _complete(groups, defaults)
            current, rates, more = _read(groups, algorithm, more_rules)
        is_known = _are_equal(current, self._last) and more == self._more
        if is_known and all(map(_is_valid_rate, rates)):
            return self._last
        check_groups(algorithm, more_rules, [_unread(group) for group in groups])
        self._last, self._more = current, more
        return current


def check_groups(
    algorithm: type[Algorithm],
    more_rules: Mapping[str, Rule],
    groups: Sequence[Mapping[str, Any]],
    first: Mapping[str, Any] | None = None,
) -> None:
    """Check the hyperparameters of groups.

    Args:
        algorithm: The algorithm of the optimizer.
        more_rules: Rules for hyperparameters that the algorithm does not have.
        groups: The parameter groups.
        first: The first group of the optimizer, if it is not the first of these.

    Raises:
        ValueError: If a group breaks a rule, or has another ``max_grad_norm`` than the first.
    """
    bound = (groups[0] if first is None else first)["max_grad_norm"]
    rule = f"the same in every group ({bound!r}), because it bounds the norm over all of them"
    for group in groups:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(lr.shape)}")
        check(algorithm.RULES, group)
        check(more_rules, group)
        algorithm.check_combination(algorithm.hyperparameters(group))
        require("max_grad_norm", rule, group["max_grad_norm"], group["max_grad_norm"] == bound)


def _read(
    groups: Sequence[Mapping[str, Any]], algorithm: type[Algorithm], more_rules: Iterable[str]
) -> tuple[list[Hyperparameters], list[Any], list[Any]]:
    hyperparameters = [algorithm.hyperparameters(group) for group in groups]
    rates = [group["lr"] for group in groups]
    return hyperparameters, rates, [group[name] for name in more_rules for group in groups]


def _complete(groups: Iterable[dict[str, Any]], defaults: Mapping[str, Any]) -> None:
    for group in groups:
        for name, value in defaults.items():
            if name not in group:
                group[name] = value


def _are_equal(values: Sequence[Any], others: Sequence[Any]) -> bool:
    try:
        return values == others
    except (ValueError, RuntimeError):  # an array or a tensor of several numbers
        return False


def _is_valid_rate(lr: Any) -> bool:
    if type(lr) is float:  # by far the most common, and checked in every step
        return 0 <= lr < math.inf
    return lr.numel() == 1 if isinstance(lr, Tensor) else LEARNING_RATE.holds(lr)


def _unread(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a group with 0 for a learning rate in a tensor, since to read it would wait for its device."""
    lr = group["lr"]
    return {**group, "lr": 0.0} if isinstance(lr, Tensor) and lr.numel() == 1 else group
