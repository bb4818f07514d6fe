"""Several optimizers as one ``torch.optim.Optimizer``."""

import warnings
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lars.combined.groups import check_fit, common_defaults, hand_out, params_of
from lightning_lars.combined.state_dicts import joined, taken_apart
from lightning_lars.combined.states import States
from lightning_lars.optim.parameters import named_params


class CombinedOptimizer(Optimizer):
    """Several optimizers, over different parameters, as one optimizer: one update rule for each.

    A step is a step of each, in their order, and nothing else: parameters and states are those of the
    optimizers stepped by hand. ``param_groups`` holds their groups themselves, so that a scheduler sets the
    rates of all, and ``state`` their states; the state dict numbers parameters over all groups, as that of
    one optimizer does. :func:`~lightning_lars.build_optimizer` builds one with ``matrix_optimizer``.

    - Hooks registered here run once for each step. A closure is evaluated once, before the first optimizer
      steps.
    - Gradient scalers unscale all gradients before the step, so that they can be clipped, including those of
      a fused optimizer, which would unscale them itself.
    - What an optimizer computes over all its parameters, such as ``max_grad_norm``, is over its own.
    - If the step of one raises, those before it have stepped. LARS and LAMB check all layers before they
      update any: put them first.

    Args:
        optimizers: Optimizers that have no parameter in common.

    Raises:
        TypeError: If one is no ``torch.optim`` optimizer.
        ValueError: If there is none, if two hold the same parameter, or if one needs a closure, such as
            ``LBFGS``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_lars import LARS, CombinedOptimizer
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> hidden = LARS([model[0].weight], lr=0.5)
        >>> rest = torch.optim.AdamW([model[0].bias, *model[2].parameters()], lr=1e-3)
        >>> optimizer = CombinedOptimizer([hidden, rest])
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.5, 0.001]
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> len(hidden.state), len(rest.state), len(optimizer.state)
        (1, 3, 4)
    """

    optimizers: list[Optimizer]
    """The optimizers, in the order in which they step."""

    # A gradient scaler would hand grad_scale and found_inf to this optimizer, not to those that use them.
    _step_supports_amp_scaling = False

    # The groups as they were when all optimizers last held the same as this one.
    _groups: list[dict[str, Any]]

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        check_fit(optimizers)
        super().__init__(list(params_of(optimizers)), common_defaults(optimizers))
        self.optimizers = optimizers
        self._adopt_groups()

    @property  # type: ignore[override]
    def state(self) -> MutableMapping[Any, Any]:
        """The state of every parameter, which its optimizer holds."""
        return States(self.optimizers)

    @state.setter
    def state(self, state: MutableMapping[Any, Any]) -> None:
        if "optimizers" in self.__dict__:  # not in Optimizer.__init__
            kept = dict(state.items())
            for each in self.optimizers:
                each.state.clear()
            for key, value in kept.items():
                self.state[key] = value

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step of each optimizer.

        Args:
            closure: Recomputes the loss and the gradients; runs once, with gradients enabled.

        Returns:
            The value of the closure, or None without one.

        Raises:
            RuntimeError: If ``param_groups`` was changed to hold a group that belongs to no optimizer.
        """
        self._follow_groups()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self.optimizers:
            each.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any], to: Optimizer | None = None) -> None:
        """Add a group to one of the optimizers.

        Args:
            param_group: The group, as in ``torch.optim``.
            to: The one of ``optimizers`` that is to step it.

        Raises:
            ValueError: If ``to`` is not one of ``optimizers``, or a parameter is already in a group.
        """
        if "optimizers" not in self.__dict__:  # in Optimizer.__init__, which checks the parameters
            super().add_param_group(param_group)
            return
        if not any(each is to for each in self.optimizers):
            kinds = [type(each).__name__ for each in self.optimizers]
            raise ValueError(
                f"to must be one of the optimizers, {kinds}, got {to!r}: pass the one that is to step the "
                "group, as in optimizer.add_param_group(group, to=optimizer.optimizers[0])"
            )
        assert to is not None
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        tensors = {id(p[1] if isinstance(p, tuple) else p) for p in given}
        if any(id(p) in tensors for p in params_of(self.optimizers)):
            raise ValueError("param_group must hold no parameter that is already in a group, got one that is")
        self._follow_groups()
        to.add_param_group({**param_group, "params": given})
        self._follow_groups()

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict as in ``torch.optim``, of all groups, with parameters numbered over all."""
        # torch has no public way to call hooks, and would number states as it finds them.
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._follow_groups()
        saved = joined(self.optimizers, self.param_groups)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, saved)
            saved = saved if changed is None else changed
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the same optimizers, each its own part.

        Parameters are matched by name where both sides have names, otherwise by position. Hyperparameters
        that the state dict does not have keep their values.

        Raises:
            ValueError: If groups do not fit, or an optimizer refuses its part. Nothing has been loaded then.
        """
        saved = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, saved)
            saved = saved if changed is None else changed
        self._follow_groups()
        messages: list[str] = []
        parts = taken_apart(saved, self.optimizers, self.param_groups, messages.append)
        previous = [each.__dict__.copy() for each in self.optimizers]
        groups = self.param_groups
        place = {id(group): index for index, group in enumerate(groups)}
        places = [[place[id(group)] for group in each.param_groups] for each in self.optimizers]
        try:
            loaded = list(groups)
            for each, part, indices in zip(self.optimizers, parts, places, strict=True):
                each.load_state_dict(part)
                for index, group in zip(indices, each.param_groups, strict=True):
                    loaded[index] = group
            self.param_groups, self._groups = loaded, list(loaded)
            for message in messages:
                warnings.warn(message, stacklevel=2)
            for after in self._optimizer_load_state_dict_post_hooks.values():
                after(self)
        except BaseException:
            for each, attributes in zip(self.optimizers, previous, strict=True):
                each.__dict__.update(attributes)
            self.param_groups, self._groups = groups, list(groups)
            raise

    def trust_ratios(self) -> dict[str, Tensor]:
        """Return the trust ratios of the last step of those optimizers that have them (LARS, LAMB).

        Returns:
            0-d tensors by parameter name, or by the parameter's number in ``state_dict()`` without names.
        """
        names = {id(p): name for name, p in named_params(self.param_groups)}
        ratios: dict[str, Tensor] = {}
        for each in self.optimizers:
            reported: Callable[[], dict[str, Tensor]] = getattr(each, "trust_ratios", dict)
            parameters = dict(named_params(each.param_groups))
            ratios |= {names[id(parameters[name])]: ratio for name, ratio in reported().items()}
        return ratios

    def __getstate__(self) -> dict[str, Any]:
        order = [id(group) for each in self.optimizers for group in each.param_groups]
        places = [order.index(id(group)) for group in self.param_groups if id(group) in order]
        return {"defaults": self.defaults, "optimizers": self.optimizers, "_places": places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        places = state.pop("_places")
        super().__setstate__(state)
        self._adopt_groups()
        groups = [self.param_groups[place] for place in places]
        self.param_groups, self._groups = groups, list(groups)

    def __repr__(self) -> str:
        return "\n".join([f"{type(self).__name__} of", *map(repr, self.optimizers)])

    def _adopt_groups(self) -> None:
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]
        self._groups = list(self.param_groups)

    def _follow_groups(self) -> None:
        """Adopt groups that were added to an optimizer, and give it those that other code has put here."""
        inner = [group for each in self.optimizers for group in each.param_groups]
        known = {id(group) for group in [*self._groups, *self.param_groups]}
        self.param_groups.extend(group for group in inner if id(group) not in known)
        if {id(group) for group in inner} != {id(group) for group in self.param_groups}:
            hand_out(self.param_groups, self.optimizers)
        self._groups = list(self.param_groups)


def parts_of(optimizers: Iterable[Any]) -> list[Any]:
    """Return the optimizers, and instead of a combined one those that it consists of.

    Example:
        >>> import torch
        >>> from lightning_lars.combined.combined_optimizer import CombinedOptimizer, parts_of
        >>> v, w = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        >>> both = CombinedOptimizer([torch.optim.SGD([v], lr=0.1), torch.optim.Adam([w])])
        >>> [type(each).__name__ for each in parts_of([both])]
        ['SGD', 'Adam']
    """
    parts: list[Any] = []
    for each in optimizers:
        parts += parts_of(each.optimizers) if isinstance(each, CombinedOptimizer) else [each]
    return parts
