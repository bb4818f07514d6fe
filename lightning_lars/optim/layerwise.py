"""What LARS and LAMB do alike: the walk over groups and layers, clipping, state, trust ratios."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lars.optim.backends.choice import (
    lay_out_as,
    takes_triton,
    warn_where_triton_fails,
    why_not_fused,
)
from lightning_lars.optim.backends.scratch import Scratch
from lightning_lars.optim.backends.triton_table import LayerTable, LayerTables
from lightning_lars.optim.layers import (
    Layers,
    Moving,
    moves_elsewhere,
    norm_of_all,
    norms_of_divided,
    sort_layers,
    stack_norms,
)
from lightning_lars.optim.parameters import check_held_params, check_params, named_params
from lightning_lars.optim.refusals import check_not_flattened, check_sees_all_gradients, dimensions
from lightning_lars.optim.state.absent import AbsentState
from lightning_lars.optim.state.checkpoint import adapt_state_dict, is_trial_of_checkpoint, restore_dtypes
from lightning_lars.optim.state.torchao import to_float
from lightning_lars.optim.trust_ratio import (
    Number,
    TrustRatios,
    at_clip,
    at_zero_rule,
    by_decay_alone,
    from_zero,
    stack_ratios,
)
from lightning_lars.rules import (
    FLAG,
    NON_NEGATIVE,
    NONE_OR_FLAG,
    NONE_OR_POSITIVE,
    Rule,
    check,
    is_number,
    require,
)
from lightning_lars.sharding.norms import Tensors, layer_norms
from lightning_lars.sharding.shards import Shard, find_shards, is_laid_out, laid_out_as, local

SHARED: dict[str, Rule] = {
    "lr": Rule(
        NON_NEGATIVE.text, lambda lr: (isinstance(lr, Tensor) or is_number(lr)) and 0 <= float(lr) < math.inf
    ),
    "weight_decay": NON_NEGATIVE,
    "decoupled_weight_decay": FLAG,
    "max_grad_norm": NONE_OR_POSITIVE,
    "maximize": FLAG,
    "fused": NONE_OR_FLAG,
    "layer_adaptation": FLAG,
}
"""What the hyperparameters of every layer-wise optimizer may be."""


class LayerwiseOptimizer(Optimizer, ABC):
    """An optimizer that scales the step of every layer by its trust ratio.

    A layer is one parameter tensor.
    """

    RULES: ClassVar[dict[str, Rule]]
    """What each hyperparameter may be."""

    state_keys: ClassVar[frozenset[str]]
    """What the optimizer keeps for each layer, under torch's own names."""

    # For the layers of the last step that moved together: themselves and their ratios, as a plain tuple
    # where they are tensors, as torch 2.11 cannot compile a step that keeps a generic one.
    _last_trust_ratios: list[tuple[list[Tensor], tuple[Tensor, ...] | list[TrustRatios[float]]]]

    # What the directions of layers are kept in until they have moved.
    _scratch: Scratch
    _tables: LayerTables

    # The parameters that have been looked at; None for those that no strategy has laid out.
    _shards: dict[Tensor, Shard | None]

    # How many dimensions the layers have that were given, or that the last step found in the groups.
    _known: dict[Tensor, int | None]
    _absent_state: AbsentState

    # The layers whose state is that of a trial, and whose first step is still to come.
    _only_tried: set[Tensor]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._last_trust_ratios = []
        self._shards, self._known, self._only_tried = {}, {}, set()
        self._absent_state = AbsentState()
        self._scratch, self._tables = Scratch(), LayerTables()
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
        super().__init__(params, {**defaults, "layer_adaptation": True})

    @classmethod
    def _defaults_from(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of ``__init__`` that are hyperparameters, which is to say, have a rule."""
        return {name: arguments[name] for name in cls.RULES if name in arguments}

    @abstractmethod
    def _direction(
        self, layers: Layers, weights: list[Tensor], grads: Tensors, lr: float | Tensor
    ) -> Tensors:
        """Return, for each layer, what its trust ratio measures the weights against.

        May decay the weights in place and advance the state, and only reads the gradients.
        """

    @abstractmethod
    def _trust_ratios(
        self, weight_norm: Number, direction_norm: Number, lr: float | Tensor, group: Mapping[str, Any]
    ) -> TrustRatios[Number]:
        """Return the ratios from the norms of the weights and of what ``_direction`` returned."""

    @abstractmethod
    def _decay_alone(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """Return least and most of ``denominator / |w|`` where weight decay is all that moves a layer."""

    @abstractmethod
    def _descend(
        self,
        layers: Layers,
        weights: list[Tensor],
        direction: Tensors,
        ratios: Tensor | None,
        lr: float | Tensor,
    ) -> None:
        """Move the weights in place along the direction, by the ratios if the group is adapted."""

    @abstractmethod
    def _descend_on_cpu(
        self,
        layers: Layers,
        weights: list[Tensor],
        direction: Tensors,
        ratios: list[float] | None,
        lr: float,
    ) -> None:
        """Do what ``_descend`` does by torch's fused kernels for the CPU."""

    @abstractmethod
    def _measure_in_triton(
        self, layers: Layers, gradient_scale: Tensor | None, lr: Tensor
    ) -> tuple[LayerTable, tuple[Tensor, Tensor] | None]:
        """Do what comes before the norms by kernels in Triton; return them too if the group is adapted."""

    @abstractmethod
    def _descend_in_triton(
        self,
        layers: Layers,
        table: LayerTable,
        ratios: Tensor | None,
        gradient_scale: Tensor | None,
        lr: Tensor,
    ) -> None:
        """Do what comes after the norms by kernels in Triton."""

    @abstractmethod
    def _advances_before_norms(self, group: Mapping[str, Any]) -> bool:
        """Tell whether it is ``_direction`` that advances the state, not ``_descend``."""

    @abstractmethod
    def _why_no_cpu_kernel(self, group: Mapping[str, Any]) -> str | None:
        """Return which option of the group torch's fused kernels on the CPU do not have, None if none."""

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError if a hyperparameter of the group breaks its rule."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(lr.shape)}")
        check(self.RULES, group)

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

        self._look_at_params()
        layers_with_grad = [
            layers._replace(are_fused=self._are_fused(layers))
            for group in self.param_groups
            for layers in sort_layers(group, self._shards, self._name)
        ]
        is_first = not self.state
        gradient_scale = self._gradient_scale(layers_with_grad)
        self._last_trust_ratios.clear()
        self._tables.start_step()
        divided = []
        for layers in layers_with_grad:
            with self._float_state(layers, before_norms=True):
                moving = self._begin(layers, gradient_scale)
            if moving.norms is not None and layers.are_divided:
                divided.append(moving)
                self._scratch.hand_over()
            else:
                self._finish(moving, moving.norms)
        self._scratch.shrink()
        self._finish_divided(divided)
        if self._only_tried:
            self._only_tried.difference_update(*(layers.params for layers in layers_with_grad))
        if not torch.compiler.is_compiling():
            self._tell_autograd(layers_with_grad)
        if is_first and is_trial_of_checkpoint():
            self._forget_step()
        return loss

    def _tell_autograd(self, layers_with_grad: Iterable[Layers]) -> None:
        """Let a backward pass raise that needs what was there before the step: not all kernels do."""
        params = list(chain.from_iterable(layers.params for layers in layers_with_grad))
        state = chain.from_iterable(self.state[p].values() for p in params if p in self.state)
        modified = [*params, *(value for value in state if isinstance(value, Tensor))]
        torch.autograd.graph.increment_version(modified)

    def _are_fused(self, layers: Layers) -> bool:
        if not torch.compiler.is_compiling():
            self._lay_out_state(layers)
        fused, part = layers.group["fused"], layers.parts[0]
        if fused is False:
            return False
        reason = None
        if not takes_triton(part):
            reason = self._why_no_cpu_kernel(layers.group)
        if reason is None:
            reason = why_not_fused(layers.parts, layers.grads, self._moments(layers.params))
        if reason is not None and fused:
            names = ", ".join(repr(self._name(p)) for p in layers.params[:3])
            raise RuntimeError(
                f"fused=True, but {reason} (parameters {names} ...): pass fused=None, which takes kernels "
                "where they can be taken"
            )
        if reason is not None and takes_triton(part) and not torch.compiler.is_compiling():
            warn_where_triton_fails(part.device, part.dtype)
        return reason is None

    def _lay_out_state(self, layers: Layers) -> None:
        """Lay out state in memory as its layer is, which may have changed since (``channels_last``).

        Raises:
            RuntimeError: If it is not on the device of its layer, or has another shape.
        """
        for p, part in zip(layers.params, layers.parts, strict=True):
            shape = part.shape
            for key, value in self.state.get(p, {}).items():
                if key not in self.state_keys or value is None:
                    continue
                here = local(value)
                if here.device != part.device:
                    raise RuntimeError(
                        f"Expected all tensors to be on the same device, but {key!r} in the state of "
                        f"parameter {self._name(p)!r} is on {here.device}, and the parameter on "
                        f"{part.device}: move it there before the step"
                    )
                if here.shape != shape and key != "step":
                    raise RuntimeError(
                        f"{key!r} in the state of parameter {self._name(p)!r} must have the parameter's "
                        f"shape, {tuple(shape)}, got {tuple(here.shape)}: delete the state of parameters "
                        "that are given another shape, or put new parameters into the groups"
                    )
                if not (here.is_contiguous() and part.is_contiguous()):
                    laid_out = lay_out_as(part, here)
                    if laid_out is not here:
                        self.state[p][key] = laid_out_as(p, laid_out)

    def _float_state(self, layers: Layers, *, before_norms: bool) -> AbstractContextManager[None]:
        """Hold the state of layers in float32 or wider, for the half of a step before or after the norms."""
        return nullcontext()

    def _moments(self, params: Iterable[Tensor]) -> list[list[Tensor]]:
        """Return what the state has of the size of each layer, as far as it is here."""
        keys = self.state_keys - {"step"}
        states: Iterable[Mapping[str, Any]] = (self.state.get(p, {}) for p in params)
        return [
            [local(value) for key, value in state.items() if key in keys and value is not None]
            for state in states
        ]

    def _begin(self, layers: Layers, gradient_scale: Tensor | None) -> Moving:
        group, params, parts, grads = layers.group, layers.params, layers.parts, layers.grads
        dtype = _dtype_of_step(params[0])
        lr, device = group["lr"], parts[0].device
        if isinstance(lr, Tensor):
            lr = lr.to(device, dtype, non_blocking=True).reshape(())
        if gradient_scale is not None:
            gradient_scale = gradient_scale.to(device, dtype, non_blocking=True)
        if layers.are_fused and takes_triton(parts[0]):
            on_device = lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=dtype, device=device)
            table, norms = self._measure_in_triton(layers, gradient_scale, on_device)
            return Moving(layers, on_device, norms, [], [], table, gradient_scale)
        weights = in_dtype(parts, dtype)
        gradients: Tensors = in_dtype(grads, dtype)
        if group["maximize"]:
            gradients = torch._foreach_neg(gradients)
        if gradient_scale is not None:
            gradients = torch._foreach_mul(gradients, gradient_scale)
        direction = self._direction(layers, weights, gradients, lr)
        norms = None
        if group["layer_adaptation"]:
            of_both = layer_norms([*weights, *direction])
            norms = (of_both[: len(weights)], of_both[len(weights) :])
        return Moving(layers, lr, norms, weights, direction)

    def _finish(self, moving: Moving, norms: tuple[Tensor, Tensor] | None) -> None:
        with self._float_state(moving.layers, before_norms=False):
            self._move(moving, norms)

    def _move(self, moving: Moving, norms: tuple[Tensor, Tensor] | None) -> None:
        layers, lr, _, weights, direction, table, gradient_scale = moving
        if layers.are_fused and table is None:
            ratios = None
            if norms is not None:
                ratios = self._adapt_on_cpu(layers.params, norms, float(lr), layers.group)
            self._descend_on_cpu(layers, weights, direction, ratios, float(lr))
        else:
            ratio = None
            if norms is not None:
                ratio = self._adapt(layers.params, norms, lr, layers.group)
            if table is not None:
                assert isinstance(lr, Tensor)
                self._descend_in_triton(layers, table, ratio, gradient_scale, lr)
                return
            self._descend(layers, weights, direction, ratio, lr)
        if weights[0].dtype != layers.parts[0].dtype:
            torch._foreach_copy_(layers.parts, weights)

    def _adapt(
        self, params: list[Tensor], norms: tuple[Tensor, Tensor], lr: float | Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        """Return the ratios of layers of one dtype, and remember them."""
        ratios = self._trust_ratios(*norms, lr, group)
        ratios = ratios._replace(ratio=ratios.ratio.to(_dtype_of_step(params[0])))
        self._last_trust_ratios.append((params, tuple(ratios)))
        return ratios.ratio

    def _adapt_on_cpu(
        self, params: list[Tensor], norms: tuple[Tensor, Tensor], lr: float, group: Mapping[str, Any]
    ) -> list[float]:
        """Return the ratios in floats, for which the equations take a tenth of the time; remember them."""
        of_weights, of_direction = (of_each.tolist() for of_each in norms)
        ratios = [
            self._trust_ratios(*of_layer, lr, group)
            for of_layer in zip(of_weights, of_direction, strict=True)
        ]
        self._last_trust_ratios.append((params, ratios))
        return [of_layer.ratio for of_layer in ratios]

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
            least_and_most = (0.0, 0.0) if group is None else self._decay_alone(group)
            return by_decay_alone(ratios, least_and_most)

        return self._by_name(value)

    def _by_name(self, value: Callable[[TrustRatios[Tensor], list[Tensor]], Tensor]) -> dict[str, Tensor]:
        values: dict[Tensor, Tensor] = {}
        for params, ratios in self._last_trust_ratios:
            if isinstance(ratios, list):
                of_layers = stack_ratios(ratios, _dtype_of_step(params[0]))
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
        self._known.update(dimensions(self.param_groups[-1]["params"]))

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict as in ``torch.optim``, of what is in the groups now."""
        held = set(_params(self.param_groups))
        # Which torch.optim has no number for.
        absent = {p: self.state.pop(p) for p in list(self.state) if isinstance(p, Tensor) and p not in held}
        try:
            return super().state_dict()
        finally:
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
            adapted.update(adapt_state_dict(saved, groups, keys, self._check_groups, caveats.append))
            return adapted

        def fit(_: Optimizer) -> None:
            restore_dtypes(self.state, adapted, self.param_groups)
            self._fit_loaded_state()

        # Between the hooks of the caller: those before see the state dict as it was saved, those after see
        # the state as it stays.
        hooks = [
            self.register_load_state_dict_pre_hook(adapt),
            self.register_load_state_dict_post_hook(fit, prepend=True),
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

    @torch.no_grad()
    def _fit_loaded_state(self) -> None:
        """Hold the state, which may have come in 8 bits, as this optimizer does."""
        for p, state in self.state.items():
            to_float(state, p)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last_trust_ratios = []
        self._shards, self._only_tried = {}, set()
        self._scratch, self._absent_state = Scratch(), AbsentState()
        if "_tables" in self.__dict__:
            self._tables.forget()
        else:
            self._tables = LayerTables()
        if "_known" not in self.__dict__:  # a copy, not an optimizer that loads a state dict
            self._known = dimensions(_params(self.param_groups))

    def _check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for group in groups:
            self._check_group(group)
        first = groups[0]["max_grad_norm"]
        rule = f"the same in every group ({first!r}), as it bounds the norm over all of them"
        for group in groups:
            require("max_grad_norm", rule, group["max_grad_norm"], group["max_grad_norm"] == first)

    def _look_at_params(self) -> None:
        """Find out who holds the rest of each parameter, once: when the first step comes, all are wrapped."""
        count = sum(len(group["params"]) for group in self.param_groups)
        if len(self._shards) == count and all(
            p in self._shards and (self._shards[p] is not None or not is_laid_out(p))
            for p in _params(self.param_groups)
        ):
            return
        named = named_params(self.param_groups)
        shards = find_shards(named)
        if len(named) != len(self._known) or any(p not in self._known for _, p in named):
            self._follow_groups(named, shards)
        check_sees_all_gradients(self, self.param_groups)
        self._shards.clear()
        for _, p in named:
            self._shards[p] = shards.get(p)

    def _follow_groups(self, named: list[tuple[str, Tensor]], shards: Mapping[Tensor, Shard]) -> None:
        """Go on with the layers of groups that have changed without ``add_param_group``."""
        check_not_flattened(named, shards, self._known)
        check_held_params(named)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._known = dimensions(p for _, p in named)
        self._only_tried.intersection_update(self._known)
        if not torch.compiler.is_compiling():  # no weak reference can be traced; state may stay behind
            self._absent_state.follow(self.state, self._known)

    def _forget_step(self) -> None:
        """Leave of a step only that there is state."""
        for state in self.state.values():
            for value in state.values():
                value.zero_()
        self._only_tried.update(self.state)
        self._last_trust_ratios.clear()

    def _name(self, p: Tensor) -> str:
        return next(name for name, other in named_params(self.param_groups) if other is p)

    def _gradient_scale(self, layers_with_grad: Sequence[Layers]) -> Tensor | None:
        """Return ``min(1, max_grad_norm / |all gradients|)``."""
        max_grad_norm = self.param_groups[0]["max_grad_norm"]
        if max_grad_norm is None:
            return None
        norm = norm_of_all(layers_with_grad, _params(self.param_groups), self._shards)
        return None if norm is None else (max_grad_norm / norm).clamp(max=1)

    def _finish_divided(self, divided: Sequence[Moving]) -> None:
        """Move layers of which other processes hold parts, after one exchange of norms for all of them."""
        if not any(self._shards.values()):
            return
        adapted = [group for group in self.param_groups if group["layer_adaptation"]]
        norms = norms_of_divided(divided, _params(adapted), self._shards)
        for moving in divided:
            device = moving.layers.parts[0].device
            self._finish(moving, stack_norms(moving.layers.params, norms, device))
        for group in adapted:
            # Nothing of these layers is here to move, but their ratios are known, and are everyone's.
            elsewhere = [p for p in group["params"] if moves_elsewhere(p, self._shards)]
            if elsewhere:
                norms_elsewhere = stack_norms(elsewhere, norms, elsewhere[0].device)
                self._adapt(elsewhere, norms_elsewhere, group["lr"], group)


def _params(groups: Iterable[Mapping[str, Any]]) -> Iterable[Tensor]:
    return chain.from_iterable(group["params"] for group in groups)


def _dtype_of_step(p: Tensor) -> torch.dtype:
    # Half precision is only how a weight is stored: all arithmetic is in at least float32.
    return torch.promote_types(p.dtype, torch.float32)


def in_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the tensors in a dtype, themselves where they have it."""
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def subtract(weights: list[Tensor], direction: Tensors, lr: float | Tensor) -> None:
    """Apply ``w = w - lr * direction``, with the roundings of ``torch.optim.SGD``."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(weights, torch._foreach_mul(direction, lr))
    else:
        torch._foreach_add_(weights, direction, alpha=-lr)
