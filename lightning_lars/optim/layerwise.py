"""The interface of ``torch.optim`` for any algorithm: construction, groups, step and checkpoints."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lars.optim.algorithm import Algorithm
from lightning_lars.optim.backends.scratch import Scratch
from lightning_lars.optim.backends.triton_table import LayerTables
from lightning_lars.optim.batches import Batch
from lightning_lars.optim.checked import CheckedHyperparameters, check_groups
from lightning_lars.optim.last_trust_ratios import LastTrustRatios
from lightning_lars.optim.parameters import check_params, named_params, recheck_params
from lightning_lars.optim.plan import Plan
from lightning_lars.optim.repartition_checks import check_not_flattened, check_sees_all_gradients, dimensions
from lightning_lars.optim.state.absent import AbsentState
from lightning_lars.optim.state.checkpoint import adapt_state_dict, is_checkpoint_dry_run, restore_dtypes
from lightning_lars.optim.state.eight_bit import EightBitState
from lightning_lars.optim.state.plain import PlainState
from lightning_lars.optim.step import Step, exchanging_groups, params_of
from lightning_lars.sharding.agreement import check_ranks_agree
from lightning_lars.sharding.shards import Shard, find_shards, is_distributed

_MISSING: Any = object()


class LayerwiseOptimizer(LastTrustRatios, Algorithm, Optimizer):
    """An optimizer that scales the step of every layer by its trust ratio.

    A layer is one parameter tensor. A subclass is an ``Algorithm``.
    """

    _storage: PlainState
    _scratch: Scratch
    _tables: LayerTables

    # What the last step found out; None if it cannot be repeated.
    _plan: Plan | None

    # How each parameter was sharded at the last step; None for plain tensors.
    _shards: dict[Tensor, Shard | None]

    # The number of dimensions of each parameter, at construction or at the last step.
    _param_ndims: dict[Tensor, int | None]
    _absent_state: AbsentState
    _checked: CheckedHyperparameters

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._last_trust_ratios = []
        self._shards, self._param_ndims = {}, {}
        self._plan = None
        self._absent_state, self._checked = AbsentState(), CheckedHyperparameters()
        self._scratch, self._tables = Scratch(), LayerTables()
        if "_storage" not in self.__dict__:
            self._storage = PlainState()
        if isinstance(params, Mapping) or not isinstance(params, Iterable):
            raise TypeError(
                f"params must be an iterable of parameters, named parameters or groups, got {params!r}: "
                "pass model.parameters(), param_groups(model), or a list with your group"
            )
        if not isinstance(params, Tensor):
            params = list(params)
            if not params:
                raise ValueError(
                    "params must hold at least one parameter, got none: "
                    "does the module have any with requires_grad=True?"
                )
        super().__init__(params, {**defaults, "layer_adaptation": True, **self._storage.defaults})

    @classmethod
    def defaults_from(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return those arguments of ``__init__`` that are hyperparameters."""
        return {name: arguments[name] for name in cls.RULES if name in arguments}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step, without a device-to-host copy and without writing to gradients.

        Args:
            closure: Recomputes the loss and the gradients; runs with gradients enabled.

        Returns:
            The value of the closure, or None without one.

        Raises:
            ValueError: If a hyperparameter of a group was changed and breaks its rule. Of a learning rate in
                a tensor only the size is checked.
            RuntimeError: If a gradient is sparse, a parameter is a shard of a layer whose norm cannot be
                computed, ranks list other layers than each other, state is on another device than its
                parameter, or ``fused=True`` is not supported.
                In either case no layer has been updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        hyperparameters = self._checked.of(self.param_groups, type(self), self._storage.rules, self.defaults)
        plan = None if torch.compiler.is_compiling() else self._plan
        found = None if plan is None else plan.unchanged(self.param_groups, hyperparameters, self.state)
        if found is None:
            self._refresh_shards()
            plan = None
        is_first = not self.state
        step = Step(
            type(self),
            self.param_groups,
            hyperparameters,
            self.state,
            self._storage,
            self._shards,
            self._scratch,
            self._tables,
            self._name_of,
            plan,
            found,
        )
        step.take()
        # In place, because torch.compile does not keep attributes that are assigned to an optimizer.
        self._last_trust_ratios.clear()
        self._last_trust_ratios.extend(step.ratios.recorded)
        self._storage.end_step(chain.from_iterable(batch.params for batch in step.batches))
        if found is not None:
            torch.autograd.graph.increment_version(found.modified)
        elif not torch.compiler.is_compiling():
            self._plan = step.plan
            _bump_versions(step.batches)
        if is_first and is_checkpoint_dry_run():
            self._storage.zero(self.state, self.param_groups)
            self._last_trust_ratios.clear()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in ``torch.optim``, without modifying the caller's dict.

        Raises:
            ValueError: If a hyperparameter breaks its rule, a parameter is complex, integer, not a leaf
                or given twice, or two parameters have the same name. No group has been added then.
        """
        if not isinstance(param_group, Mapping) or "params" not in param_group:
            raise TypeError(f'param_group must be a dict with "params", got {param_group!r}')
        group = {**self.defaults, **param_group}
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        if not isinstance(group["params"], set):
            group["params"] = check_params(list(group["params"]), self.param_groups)
        if any(group["lr"] is other["lr"] for other in self.param_groups if isinstance(other["lr"], Tensor)):
            # Schedulers write to the tensor of each group, and would scale a shared one twice.
            group["lr"] = group["lr"].clone()
        self._check_groups([group], first=(self.param_groups or [group])[0])
        super().add_param_group(group)
        self._param_ndims.update(dimensions(self.param_groups[-1]["params"]))

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict as in ``torch.optim``, of the parameters that are in the groups now."""
        held = set(params_of(self.param_groups))
        # torch.optim cannot number the others.
        absent = {p: self.state.pop(p) for p in list(self.state) if isinstance(p, Tensor) and p not in held}
        # Before the hooks of the caller, which see the plain state dict.
        hook = self.register_state_dict_post_hook(lambda _, saved: self._storage.save(saved), prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()
            self.state.update(absent)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, or of ``torch.optim.SGD`` (LARS) or ``AdamW`` (LAMB).

        If both sides have names, state and hyperparameters are matched by name, regardless of order, groups
        and wrappers (``module.``); otherwise by position, as in ``torch.optim``. The optimizer keeps its
        names, its ``fused``, and hyperparameters that the state dict does not have. The state of
        half-precision parameters is in float32.

        Raises:
            ValueError: If parameters, hyperparameters or state do not fit. Nothing has been loaded then.
        """
        adapted: dict[str, Any] = {}
        messages: list[str] = []

        def adapt(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            groups, keys = self.param_groups, self.state_keys
            adapted.update(
                adapt_state_dict(saved, groups, keys, self.moments, self._check_groups, messages.append)
            )
            return adapted

        def convert(_: Optimizer) -> None:
            restore_dtypes(self.state, adapted, self.param_groups)
            self._storage.convert_loaded(self.state, self.param_groups)

        # The hooks of the caller run first before loading, on the state dict as it was saved, and last after
        # it, on the final state.
        hooks = [
            self.register_load_state_dict_pre_hook(adapt),
            self.register_load_state_dict_post_hook(convert, prepend=True),
        ]
        before = self.__dict__.copy()
        try:
            super().load_state_dict(state_dict)
            for message in messages:
                warnings.warn(message, stacklevel=2)
        except BaseException:
            self.__dict__.update(before)
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last_trust_ratios = []
        self._shards, self._plan = {}, None
        self._scratch, self._absent_state = Scratch(), AbsentState()
        self._checked = CheckedHyperparameters()
        if "_tables" in self.__dict__:
            self._tables.forget()
        else:
            self._tables = LayerTables()
        if "_storage" in self.__dict__:
            self._storage = self._storage.fresh()
        else:
            size = self.defaults.get("min_8bit_size")
            self._storage = PlainState() if size is None else EightBitState(size)
        if "_param_ndims" not in self.__dict__:  # a copy, not an optimizer that loads a state dict
            self._param_ndims = dimensions(params_of(self.param_groups))

    def _check_groups(
        self, groups: Sequence[Mapping[str, Any]], first: Mapping[str, Any] | None = None
    ) -> None:
        check_groups(type(self), self._storage.rules, groups, first)

    def _refresh_shards(self) -> None:
        """Find how the parameters are sharded, at the first step, when all wrappers are in place."""
        if self._shards_are_current():
            return
        named = named_params(self.param_groups)
        shards = find_shards(named)
        if len(named) != len(self._param_ndims) or any(p not in self._param_ndims for _, p in named):
            self._adopt_changed_groups(named, shards)
        self._storage.check({name: shards[p] for name, p in named if p in shards})
        check_sees_all_gradients(self, self.param_groups)
        if shards and not torch.compiler.is_compiling():
            exchanged = set(params_of(exchanging_groups(self.param_groups)))
            check_ranks_agree([(name, p) for name, p in named if p in exchanged], shards)
        self._shards.clear()
        for _, p in named:
            self._shards[p] = shards.get(p)

    def _shards_are_current(self) -> bool:
        """Return whether the groups hold the parameters of the last step, sharded as they were then."""
        count = 0
        for p in params_of(self.param_groups):
            shard = self._shards.get(p, _MISSING)
            if shard is _MISSING or (shard is None and is_distributed(p)):
                return False
            count += 1
        return count == len(self._shards)

    def _adopt_changed_groups(self, named: list[tuple[str, Tensor]], shards: Mapping[Tensor, Shard]) -> None:
        """Adopt the parameters of groups that were changed without ``add_param_group``."""
        check_not_flattened(named, shards, self._param_ndims)
        recheck_params(named)
        # In place, because torch 2.11 cannot compile an assignment to an attribute of an optimizer.
        self._param_ndims.clear()
        self._param_ndims.update(dimensions(p for _, p in named))
        self._storage.keep_only(self._param_ndims)
        if not torch.compiler.is_compiling():  # which cannot trace weak references; the state then stays
            self._absent_state.follow(self.state, self._param_ndims)

    def _name_of(self, p: Tensor) -> str:
        return next(name for name, other in named_params(self.param_groups) if other is p)


def _bump_versions(batches: Iterable[Batch]) -> None:
    """Mark weights and state as modified for autograd, which not all kernels do.

    A backward pass that needs their values from before the step then raises.
    """
    modified: list[Tensor] = []
    for batch in batches:
        states = chain.from_iterable(state.values() for state in batch.states if state)
        modified += batch.params
        modified += [value for value in states if isinstance(value, Tensor)]
    torch.autograd.graph.increment_version(modified)
