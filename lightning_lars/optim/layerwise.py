"""What ``torch.optim`` asks of an optimizer, over any algorithm; and the trust ratios of its last step."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lars.optim.algorithm import Algorithm
from lightning_lars.optim.backends.eager import dtype_of_step
from lightning_lars.optim.backends.scratch import Scratch
from lightning_lars.optim.backends.triton_table import LayerTables
from lightning_lars.optim.batches import Batch
from lightning_lars.optim.parameters import check_params, named_params, recheck_params
from lightning_lars.optim.plan import Plan
from lightning_lars.optim.repartition_checks import check_not_flattened, check_sees_all_gradients, dimensions
from lightning_lars.optim.state.absent import AbsentState
from lightning_lars.optim.state.checkpoint import adapt_state_dict, is_checkpoint_dry_run, restore_dtypes
from lightning_lars.optim.state.eight_bit import EightBitState
from lightning_lars.optim.state.plain import PlainState
from lightning_lars.optim.step import Ratios, Step, params_of
from lightning_lars.optim.trust_ratio import (
    TrustRatios,
    at_clip,
    at_zero_rule,
    by_decay_alone,
    from_zero,
    stack_ratios,
)
from lightning_lars.rules import check, require
from lightning_lars.sharding.shards import Shard, find_shards, is_laid_out

_MISSING: Any = object()


class LayerwiseOptimizer(Algorithm, Optimizer):
    """An optimizer that scales the step of every layer by its trust ratio.

    A layer is one parameter tensor. A subclass is an ``Algorithm``.
    """

    # The layers of the last step that moved together, and their ratios.
    _last_trust_ratios: list[tuple[list[Tensor], Ratios]]

    _storage: PlainState
    _scratch: Scratch
    _tables: LayerTables

    # Of the last step; None where it cannot be repeated.
    _plan: Plan | None

    # The parameters that have been looked at; None for those that no strategy has laid out.
    _shards: dict[Tensor, Shard | None]

    # How many dimensions the layers have that were given, or that the last step found in the groups.
    _param_ndims: dict[Tensor, int | None]
    _absent_state: AbsentState

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._last_trust_ratios = []
        self._shards, self._param_ndims = {}, {}
        self._plan = None
        self._absent_state = AbsentState()
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
                    "has the module any with requires_grad=True?"
                )
        super().__init__(params, {**defaults, "layer_adaptation": True, **self._storage.defaults})

    @classmethod
    def defaults_from(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of ``__init__`` that are hyperparameters, which is to say, have a rule."""
        return {name: arguments[name] for name in cls.RULES if name in arguments}

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError if a hyperparameter of the group breaks its rule."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(lr.shape)}")
        check(self.RULES, group)
        check(self._storage.rules, group)
        self.check_combination(self.hyperparameters(group))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. Nothing is read back to the host, and no gradient is written to.

        Args:
            closure: Recomputes the loss and the gradients; runs with gradients enabled.

        Returns:
            What the closure returned, or None without one.

        Raises:
            RuntimeError: If a gradient is sparse, a parameter is a part of a layer whose norm cannot be
                known, state is on another device than its parameter, or no kernel can do what
                ``fused=True`` asks for; nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        plan = None if torch.compiler.is_compiling() else self._plan
        found = None if plan is None else plan.look(self.param_groups, self.state)
        if found is None:
            self._refresh_shards()
            plan = None
        is_first = not self.state
        step = Step(
            type(self),
            self.param_groups,
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
        # In place: torch.compile keeps no attribute that an optimizer is given.
        self._last_trust_ratios.clear()
        self._last_trust_ratios.extend(step.ratios)
        moved = list(chain.from_iterable(batch.params for batch in step.batches))
        self._storage.end_step(moved)
        if found is not None:
            torch.autograd.graph.increment_version(found.modified)
        elif not torch.compiler.is_compiling():
            self._plan = step.plan
            _bump_versions(step.batches)
        if is_first and is_checkpoint_dry_run():
            self._storage.zero(self.state, self.param_groups)
            self._last_trust_ratios.clear()
        return loss

    def trust_ratios(self) -> dict[str, Tensor]:
        """Return the trust ratio that the last step used for each adapted layer.

        Returns:
            0-d tensors on the device of their layer, by parameter name, or by the parameter's number in
            ``state_dict()`` where the optimizer was built without names. Empty before the first step
            and after a state dict was loaded.
        """
        return self._by_name(lambda ratios, _: ratios.ratio)

    def at_trust_clip(self) -> dict[str, Tensor]:
        """Return for each adapted layer whether ``trust_clip`` changed its ratio in the last step.

        Returns:
            0-d bool tensors, as :meth:`trust_ratios` returns them.
        """
        return self._by_name(lambda ratios, _: at_clip(ratios))

    def at_zero_rule(self) -> dict[str, Tensor]:
        """Return for each adapted layer whether its ratio was 1 in the last step for want of a scale.

        Returns:
            0-d bool tensors, as :meth:`trust_ratios` returns them.
        """
        return self._by_name(lambda ratios, _: at_zero_rule(ratios))

    def from_zero(self) -> dict[str, Tensor]:
        """Return for each adapted layer whether its weights were all 0 before the last step, which moved it.

        Such a step has no scale: with a ratio of 1 before clipping, it is that of SGD (LARS) or Adam (LAMB).

        Returns:
            0-d bool tensors, as :meth:`trust_ratios` returns them.
        """
        return self._by_name(lambda ratios, _: from_zero(ratios))

    def by_decay_alone(self) -> dict[str, Tensor]:
        """Return for each adapted layer whether weight decay alone made its last step.

        So it is with a gradient of 0 where the decay is part of what is adapted. The trust ratio makes such a
        step as long as any other, whatever ``weight_decay`` is.

        Returns:
            0-d bool tensors, as :meth:`trust_ratios` returns them.
        """
        group_of = {p: group for group in self.param_groups for p in group["params"]}

        def value(ratios: TrustRatios[Tensor], params: list[Tensor]) -> Tensor:
            # They are of one group, which someone may have taken them out of since.
            group = next((group_of[p] for p in params if p in group_of), None)
            if group is None:
                return by_decay_alone(ratios, (0.0, 0.0))
            return by_decay_alone(ratios, self.decay_only_bounds(self.hyperparameters(group)))

        return self._by_name(value)

    def _by_name(self, value: Callable[[TrustRatios[Tensor], list[Tensor]], Tensor]) -> dict[str, Tensor]:
        values: dict[Tensor, Tensor] = {}
        for params, ratios in self._last_trust_ratios:
            if isinstance(ratios, list):
                of_layers = stack_ratios(ratios, dtype_of_step(params[0]))
            else:
                of_layers = TrustRatios(*ratios)
            values.update(zip(params, value(of_layers, params).unbind(), strict=True))
        return {name: values[p] for name, p in named_params(self.param_groups) if p in values}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in ``torch.optim``; the caller's dict stays as it was.

        Raises:
            ValueError: If a hyperparameter breaks its rule, a parameter is complex, integer, not a leaf
                or given twice, or a name stands for two parameters. No group has been added then.
        """
        if not isinstance(param_group, Mapping) or "params" not in param_group:
            raise TypeError(f'param_group must be a dict with "params", got {param_group!r}')
        group = {**self.defaults, **param_group}
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        if not isinstance(group["params"], set):
            group["params"] = check_params(list(group["params"]), self.param_groups)
        if any(group["lr"] is other["lr"] for other in self.param_groups if isinstance(other["lr"], Tensor)):
            # Schedulers write into the tensor of each group: one that is shared would be scaled twice.
            group["lr"] = group["lr"].clone()
        self._check_groups([*self.param_groups, group])
        super().add_param_group(group)
        self._param_ndims.update(dimensions(self.param_groups[-1]["params"]))

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict as in ``torch.optim``, of what is in the groups now."""
        held = set(params_of(self.param_groups))
        # Which torch.optim has no number for.
        absent = {p: self.state.pop(p) for p in list(self.state) if isinstance(p, Tensor) and p not in held}
        # Ahead of the hooks of the caller, which have the last word.
        hook = self.register_state_dict_post_hook(lambda _, saved: self._storage.save(saved), prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()
            self.state.update(absent)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, or of ``torch.optim.SGD`` (LARS) or ``AdamW`` (LAMB).

        Where both sides have names, state and hyperparameters follow them, whatever the order, the groups and
        the wrappers (``module.``); otherwise they are matched by position, as in ``torch.optim``. Names,
        ``fused``, and hyperparameters that the state dict does not name, stay as they are here. The state of
        half-precision parameters stays in float32.

        Raises:
            ValueError: If parameters, hyperparameters or state do not fit. Nothing has been loaded then.
        """
        adapted: dict[str, Any] = {}
        caveats: list[str] = []

        def adapt(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            groups, keys = self.param_groups, self.state_keys
            adapted.update(
                adapt_state_dict(saved, groups, keys, self.moments, self._check_groups, caveats.append)
            )
            return adapted

        def convert(_: Optimizer) -> None:
            restore_dtypes(self.state, adapted, self.param_groups)
            self._storage.convert_loaded(self.state, self.param_groups)

        # Between the hooks of the caller: those before see the state dict as it was saved, those after see
        # the state as it stays.
        hooks = [
            self.register_load_state_dict_pre_hook(adapt),
            self.register_load_state_dict_post_hook(convert, prepend=True),
        ]
        before = self.__dict__.copy()
        try:
            super().load_state_dict(state_dict)
            for caveat in caveats:
                warnings.warn(caveat, stacklevel=2)
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

    def _check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for group in groups:
            self._check_group(group)
        first = groups[0]["max_grad_norm"]
        rule = f"the same in every group ({first!r}), as it bounds the norm over all of them"
        for group in groups:
            require("max_grad_norm", rule, group["max_grad_norm"], group["max_grad_norm"] == first)

    def _refresh_shards(self) -> None:
        """Find out who holds the rest of each parameter, once: when the first step comes, all are wrapped."""
        if self._shards_are_current():
            return
        named = named_params(self.param_groups)
        shards = find_shards(named)
        if len(named) != len(self._param_ndims) or any(p not in self._param_ndims for _, p in named):
            self._adopt_changed_groups(named, shards)
        self._storage.check({name: shards[p] for name, p in named if p in shards})
        check_sees_all_gradients(self, self.param_groups)
        self._shards.clear()
        for _, p in named:
            self._shards[p] = shards.get(p)

    def _shards_are_current(self) -> bool:
        """Return whether the groups hold the parameters of the last step, sharded as they were then."""
        count = 0
        for p in params_of(self.param_groups):
            shard = self._shards.get(p, _MISSING)
            if shard is _MISSING or (shard is None and is_laid_out(p)):
                return False
            count += 1
        return count == len(self._shards)

    def _adopt_changed_groups(self, named: list[tuple[str, Tensor]], shards: Mapping[Tensor, Shard]) -> None:
        """Go on with the layers of groups that have changed without ``add_param_group``."""
        check_not_flattened(named, shards, self._param_ndims)
        recheck_params(named)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._param_ndims = dimensions(p for _, p in named)
        self._storage.keep_only(self._param_ndims)
        if not torch.compiler.is_compiling():  # no weak reference can be traced; state may stay behind
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
