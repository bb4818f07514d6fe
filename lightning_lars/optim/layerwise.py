"""What LARS and LAMB do alike: the walk over groups and layers, clipping, state, trust ratios."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lars.optim.arguments import (
    check_non_negative,
    check_none_or_positive,
    is_number,
    require,
)
from lightning_lars.optim.checkpoint import adapt_state_dict, restore_dtypes
from lightning_lars.optim.norms import Tensors, is_sharded, layer_norms

# How many elements are worked on at once. Their updates exist at the same time, for weights of half precision
# beside a float32 copy: 256 MiB of scratch for four tensors of this size.
_ELEMENTS_AT_ONCE = 2**24


class Layers(NamedTuple):
    """Layers of one group that share a device and a dtype, with their gradients."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]


class LayerwiseOptimizer(Optimizer, ABC):
    """An optimizer that scales the step of every layer by its trust ratio.

    A layer is one parameter tensor. Subclasses state their rules in ``_check_group`` and their paper's
    equations in ``_update``.
    """

    state_keys: ClassVar[frozenset[str]]
    """What the optimizer keeps for each layer, under torch's own names."""

    switches: ClassVar[tuple[str, ...]]
    """The hyperparameters that are True or False."""

    # For each call of `_update` in the last step: its layers and their ratios, shape (layers,).
    _last_trust_ratios: list[tuple[list[Tensor], Tensor]]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._last_trust_ratios = []
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

    @abstractmethod
    def _update(
        self,
        weights: list[Tensor],
        grads: Tensors,
        states: list[dict[str, Any]],
        lr: float | Tensor,
        group: Mapping[str, Any],
    ) -> Tensor | None:
        """Move the weights in place, only read the gradients, return the ratios ``(layers,)`` used."""

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError if a hyperparameter of the group breaks its rule."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(lr.shape)}")
        holds = (isinstance(lr, Tensor) or is_number(lr)) and 0 <= float(lr) < math.inf
        require("lr", "at least 0 and finite", lr, holds)
        check_non_negative("weight_decay", group["weight_decay"])
        check_none_or_positive("max_grad_norm", group["max_grad_norm"])
        for argument in self.switches:
            require(argument, "True or False", group[argument], isinstance(group[argument], bool))
        require(
            "fused",
            "None or False (there is no fused implementation in this version)",
            group["fused"],
            not group["fused"],
        )

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
            RuntimeError: If a gradient is sparse or a parameter is a shard; nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        layers_with_grad = [layers for group in self.param_groups for layers in self._layers(group)]
        gradient_scale = self._gradient_scale(layers_with_grad)
        self._last_trust_ratios.clear()
        for group, params, grads in layers_with_grad:
            # Half precision is only how a weight is stored: all arithmetic is in at least float32.
            dtype = torch.promote_types(params[0].dtype, torch.float32)
            weights = [p.to(dtype) for p in params]
            gradients: Tensors = [g.to(dtype) for g in grads]
            if group["maximize"]:
                gradients = torch._foreach_neg(gradients)
            if gradient_scale is not None:
                scale = gradient_scale.to(params[0].device, dtype, non_blocking=True)
                gradients = torch._foreach_mul(gradients, scale)
            lr = group["lr"]
            if isinstance(lr, Tensor):
                lr = lr.to(params[0].device, dtype, non_blocking=True).reshape(())
            ratios = self._update(weights, gradients, [self.state[p] for p in params], lr, group)
            if dtype != params[0].dtype:
                torch._foreach_copy_(params, weights)
            if ratios is not None:
                self._last_trust_ratios.append((params, ratios.to(dtype)))
        return loss

    def trust_ratios(self) -> dict[str, Tensor]:
        """Return the trust ratio that the last step used for each adapted layer.

        Returns:
            0-d tensors on the device of their layer, by parameter name, or by the parameter's number in
            ``state_dict()`` where the optimizer was built without names. Empty before the first step
            and after a state dict was loaded.
        """
        names = {p: name for group in self.param_groups for name, p in self._named_params(group)}
        return {
            names[p]: ratio
            for params, ratios in self._last_trust_ratios
            for p, ratio in zip(params, ratios.unbind(), strict=True)
            if p in names
        }

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
            group["params"] = self._check_params(list(group["params"]))
        if any(group["lr"] is other["lr"] for other in self.param_groups if isinstance(other["lr"], Tensor)):
            # Schedulers write into the tensor of each group: one that is shared would be scaled twice.
            group["lr"] = group["lr"].clone()
        self._check_groups([*self.param_groups, group])
        super().add_param_group(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, or of ``torch.optim.SGD`` (LARS) or ``AdamW`` (LAMB).

        Hyperparameters that the state dict does not name keep the value they have here, and ``fused``
        always does. The state of half-precision parameters stays in float32.

        Raises:
            ValueError: If groups, hyperparameters or state do not fit. Nothing has been loaded then.
        """
        adapted: dict[str, Any] = {}

        def adapt(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            adapted.update(adapt_state_dict(saved, self.param_groups, self.state_keys, self._check_groups))
            return adapted

        # Registered last, it sees what the hooks of the caller made of the state dict.
        hook = self.register_load_state_dict_pre_hook(adapt)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        restore_dtypes(self.state, adapted, self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last_trust_ratios = []

    def _check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for group in groups:
            self._check_group(group)
        first = groups[0]["max_grad_norm"]
        rule = f"the same in every group ({first!r}), as it bounds the norm over all of them"
        for group in groups:
            require("max_grad_norm", rule, group["max_grad_norm"], group["max_grad_norm"] == first)

    def _named_params(self, group: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
        if "param_names" in group:
            return zip(group["param_names"], group["params"], strict=True)
        before = 0
        for other in self.param_groups:
            if other is group:
                break
            before += len(other["params"])
        return ((str(before + i), p) for i, p in enumerate(group["params"]))

    def _check_params(self, params: list[Any]) -> list[Any]:
        """Return the parameters, named by their number if they are not where the other groups' are."""
        if any("param_names" in group for group in self.param_groups):
            before = sum(len(group["params"]) for group in self.param_groups)
            if all(isinstance(p, Tensor) for p in params):
                params = [(str(before + index), p) for index, p in enumerate(params)]
        seen = set(chain.from_iterable(group["params"] for group in self.param_groups))
        seen_names = set(chain.from_iterable(group.get("param_names", ()) for group in self.param_groups))
        for index, entry in enumerate(params):
            name, p = entry if isinstance(entry, tuple) and len(entry) == 2 else (None, entry)
            if not isinstance(p, Tensor):
                raise TypeError(f"params must be tensors or (name, tensor) pairs, got {p!r} at {index}")
            label = f"parameter {index if name is None else name!r}"
            if not p.is_floating_point():
                raise ValueError(f"params must be real floating-point tensors, got {label} of {p.dtype}")
            if not p.is_leaf:
                raise ValueError(
                    f"params must be leaf tensors, got {label}, which is the result of an operation: "
                    "pass the parameter that it was computed from"
                )
            if p in seen:
                raise ValueError(f"params must hold every parameter once, got {label} twice")
            if name is not None and name in seen_names:
                raise ValueError(
                    f"params must give every parameter a name of its own, got {name!r} twice: "
                    "put the name of its module in front"
                )
            seen.add(p)
            seen_names.add(name)
        return params

    def _layers(self, group: dict[str, Any]) -> Iterable[Layers]:
        """Sort the layers that have a gradient by device and dtype, and into parts of bounded size."""
        buckets: dict[tuple[torch.device, torch.dtype, int], Layers] = {}
        elements: dict[tuple[torch.device, torch.dtype], int] = {}
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} needs dense gradients, got a sparse one for "
                    f"{self._label(group, i)}: build its module with sparse=False or give it to SparseAdam"
                )
            if is_sharded(p):
                raise RuntimeError(
                    f"{type(self).__name__} needs the norm of the whole layer, but "
                    f"{self._label(group, i)} is sharded (FSDP, tensor parallel), "
                    "which this version cannot reduce: train with strategy='ddp'"
                )
            kind = (p.device, p.dtype)
            elements[kind] = elements.get(kind, 0) + p.numel()
            layers = buckets.setdefault((*kind, elements[kind] // _ELEMENTS_AT_ONCE), Layers(group, [], []))
            layers.params.append(p)
            layers.grads.append(p.grad)
        return buckets.values()

    def _label(self, group: Mapping[str, Any], index: int) -> str:
        return f"parameter {list(self._named_params(group))[index][0]!r}"

    def _gradient_scale(self, layers_with_grad: Sequence[Layers]) -> Tensor | None:
        """Return ``min(1, max_grad_norm / |all gradients|)``.

        A layer whose gradient is not finite is left out of the norm, so that it spoils no other.
        """
        max_grad_norm = self.param_groups[0]["max_grad_norm"]
        if max_grad_norm is None or not layers_with_grad:
            return None
        device = layers_with_grad[0].params[0].device
        norms = [layer_norms(layers.grads).to(device, non_blocking=True) for layers in layers_with_grad]
        norm_of_each = torch.cat(norms)
        norm_of_all = torch.linalg.vector_norm(norm_of_each.where(norm_of_each.isfinite(), 0))
        scale: Tensor = (max_grad_norm / norm_of_all).clamp(max=1)
        return scale


def subtract(weights: list[Tensor], direction: Tensors, lr: float | Tensor) -> None:
    """Apply ``w = w - lr * direction``, with the roundings of ``torch.optim.SGD``."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(weights, torch._foreach_mul(direction, lr))
    else:
        torch._foreach_add_(weights, direction, alpha=-lr)
