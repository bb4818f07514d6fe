"""The scheduler that warms up and decays the learning rate."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_lars.learning_rate.curves import (
    WARMUPS,
    constant_decay,
    cosine_decay,
    inverse_sqrt_decay,
    one_cycle,
    one_cycle_momentum,
    polynomial_decay,
    step_decay,
    wsd_decay,
)
from lightning_lars.learning_rate.optimizer_steps import observed_steps
from lightning_lars.learning_rate.warmup_decay_rules import (
    check_cooldown,
    check_effects,
    check_has_momentum,
    check_milestones,
    check_names,
    check_optimizer,
    check_shapes,
    check_steps,
)
from lightning_lars.rules import as_int


class WarmupDecayLR(LRScheduler):
    """Warm up the learning rate of every group to the group's own peak, then decay it.

    ``lr = peak * warmup(step)`` before step ``warmup_steps``, ``lr = peak * decay(step)`` from there on, in
    closed form, for the next optimizer step. Call ``step()`` once per optimizer step. A group that is added
    later is scheduled from the next call on, with its ``lr`` as the peak.

    Args:
        optimizer: The optimizer, with the peaks as its learning rates.
        warmup_steps: Optimizer steps until the rate is at its peak, from 0 to below ``total_steps``.
        total_steps: Optimizer steps of the whole run, at least 1. With None, they must be set by
            :meth:`set_total_steps`, which LargeBatchMixin and LargeBatchCLI call.
        warmup: Shape of the warmup; ``"cosine"`` for ``decay="one_cycle"``.
        decay: Shape of the decay; ``"one_cycle"`` is a complete schedule and schedules the momentum too.
        start_factor: Fraction of the peak at the start, in [0, 1]. Default: 1/25 for ``"one_cycle"``, else 0.
            ``"one_cycle"`` and the warmups ``"constant"`` and ``"exponential"`` need more than 0.
        end_factor: Fraction of the peak at the end of ``"cosine"``, ``"polynomial"``, ``"wsd"`` and
            ``"one_cycle"``, in [0, 1]. Default: 1/250000 for ``"one_cycle"``, else 0.
        power: Exponent of ``"polynomial"``, above 0. Default: 2.
        milestones: Optimizer steps after which ``"step"`` multiplies by ``gamma``, ascending.
        gamma: Factor of ``"step"``, in (0, 1]. Default: 0.1.
        cooldown_steps: The last optimizer steps, in which ``"wsd"`` decays, from 0 (no cooldown yet) to
            ``total_steps - warmup_steps``. Default: a fifth of ``total_steps``, if the warmup leaves so many.
        cooldown: Shape of the cooldown of ``"wsd"``. Default: ``"linear"``.
        momentum_range: Lowest and highest momentum, or first beta, of ``"one_cycle"``, in [0, 1).
            Default: (0.85, 0.95).
        last_epoch: Number of optimizer steps already taken, minus 1, as in torch.

    Raises:
        ValueError: If an argument breaks its rule or has no effect. The optimizer is then unchanged.
        TypeError: If ``optimizer`` is no optimizer.
        KeyError: If ``last_epoch`` is not -1 and a group has no ``initial_lr``.

    Example:
        >>> import torch
        >>> from lightning_lars import LARS
        >>> from lightning_lars import WarmupDecayLR
        >>> optimizer = LARS([torch.nn.Parameter(torch.ones(2))], lr=10.0)
        >>> scheduler = WarmupDecayLR(optimizer, warmup_steps=2, total_steps=6, decay="polynomial")
        >>> for step in range(1, 8):
        ...     print(f"step {step}: {optimizer.param_groups[0]['lr']}")
        ...     optimizer.step()
        ...     scheduler.step()
        step 1: 5.0
        step 2: 10.0
        step 3: 10.0
        step 4: 5.625
        step 5: 2.5
        step 6: 0.625
        step 7: 0.0
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int | None = None,
        warmup: Literal["constant", "linear", "exponential", "cosine"] = "linear",
        decay: Literal[
            "constant", "cosine", "polynomial", "inverse_sqrt", "step", "wsd", "one_cycle"
        ] = "cosine",
        *,
        start_factor: float | None = None,
        end_factor: float | None = None,
        power: float | None = None,
        milestones: Sequence[int] | None = None,
        gamma: float | None = None,
        cooldown_steps: int | None = None,
        cooldown: Literal["linear", "sqrt", "cosine"] | None = None,
        momentum_range: tuple[float, float] | None = None,
        last_epoch: int = -1,
    ) -> None:
        check_optimizer(optimizer)
        check_steps(warmup_steps, total_steps)
        check_names(warmup, decay)
        options = {
            "start_factor": start_factor,
            "end_factor": end_factor,
            "power": power,
            "milestones": milestones,
            "gamma": gamma,
            "cooldown_steps": cooldown_steps,
            "cooldown": cooldown,
            "momentum_range": momentum_range,
        }
        check_effects(warmup_steps, decay, options)
        is_cycle = decay == "one_cycle"
        self.warmup_steps, self.total_steps = as_int(warmup_steps), as_int(total_steps)
        self.warmup, self.decay = warmup, decay
        start, end = (1 / 25, 1 / 250_000) if is_cycle else (0.0, 0.0)
        self.start_factor = start if start_factor is None else start_factor
        self.end_factor = end if end_factor is None else end_factor
        self.power = 2.0 if power is None else power
        self.milestones = tuple(map(as_int, () if milestones is None else milestones))
        self.gamma = 0.1 if gamma is None else gamma
        self.cooldown_steps = as_int(cooldown_steps)
        self.cooldown = "linear" if cooldown is None else cooldown
        self.momentum_range = tuple((0.85, 0.95) if momentum_range is None else momentum_range)
        check_shapes(vars(self))
        if is_cycle:
            check_has_momentum(optimizer)
        self.steps_before = 0
        self._steps_seen = observed_steps(optimizer)
        self._has_warned = False
        _warn_of_unscaled(optimizer)
        super().__init__(optimizer, last_epoch)

    def set_total_steps(self, total_steps: int, steps_before: int = 0) -> None:
        """Set the number of optimizer steps.

        Args:
            total_steps: Optimizer steps of the whole run, at least 1.
            steps_before: Steps that were taken before this schedule began and do not count toward it: a
                second fit of a Trainer starts a new schedule.

        Raises:
            ValueError: If ``warmup_steps``, ``milestones`` or ``cooldown_steps`` do not fit. The previous
                length is then kept.
        """
        check_steps(self.warmup_steps, total_steps)
        if self.decay == "step":
            check_milestones(self.milestones, self.warmup_steps, total_steps)
        check_cooldown(self.cooldown_steps, self.warmup_steps, total_steps)
        self.total_steps, self.steps_before = as_int(total_steps), as_int(steps_before)

    @override
    def step(self, epoch: int | None = None) -> None:
        """Advance to the next optimizer step. Call this once per optimizer step.

        Warns, once, if the optimizer took several steps since the last call: the curves count optimizer
        steps.
        """
        steps = observed_steps(self.optimizer) - self._steps_seen
        super().step(epoch)
        # With torch 2.6, SequentialLR resets a scheduler to its start by step(0).
        if steps > 1 and epoch is None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"WarmupDecayLR counts optimizer steps, and {type(self.optimizer).__name__} took {steps} "
                "since the scheduler's last step: call step() once per optimizer step. In Lightning, return "
                '{"scheduler": scheduler, "interval": "step"} from configure_optimizers, whose default is '
                '"epoch", or use LargeBatchMixin or LargeBatchCLI, which do so',
                stacklevel=2,
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scheduler, without values that depend on this optimizer object."""
        transient = ("_steps_seen", "_has_warned")
        return {key: value for key, value in super().state_dict().items() if key not in transient}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, including, as in torch's schedulers, the ``total_steps`` that it was saved with.

        Warns if these differ from this scheduler's. A state that was saved without ``total_steps`` keeps this
        scheduler's. With ``decay="wsd"`` this scheduler keeps its own ``total_steps`` and cooldown as long as
        neither its cooldown nor that of the state has begun: from any checkpoint of its stable phase, a run
        is cooled down by resuming with another ``total_steps`` and ``cooldown_steps``.

        Raises:
            ValueError: If this scheduler has no ``total_steps``, and its cooldown does not fit into those of
                the state. Nothing is loaded then.
        """
        own, before = self.total_steps, self.steps_before
        own_end = {name: vars(self)[name] for name in ("cooldown_steps", "cooldown", "end_factor")}
        if own is None and state_dict.get("decay") == "wsd":
            check_cooldown(self.cooldown_steps, self.warmup_steps, state_dict["total_steps"])
        super().load_state_dict(state_dict)
        self._steps_seen = observed_steps(self.optimizer)
        if own is not None:
            own += before - self.steps_before  # as long as the state's, if it ends with the same step
        saved = self.total_steps, {name: vars(self)[name] for name in own_end}
        if self.decay == "wsd" and self._is_stable():
            # Nothing yet depended on the end.
            self.total_steps = saved[0] if own is None else own
            vars(self).update(own_end)
            if self._is_stable():
                return
            self.total_steps = saved[0]
            vars(self).update(saved[1])
        if self.total_steps is None:
            self.total_steps = own
        elif own not in (None, self.total_steps) or (self.decay == "wsd" and saved[1] != own_end):
            theirs, ours = f"total_steps={self.total_steps}", f"{own}"
            if self.decay == "wsd":
                theirs += f" and cooldown_steps={self.cooldown_steps}"
                ours += f" and {own_end['cooldown_steps']}, because one of the two cooldowns has begun"
            warnings.warn(
                f"The state has {theirs}, which replaces {ours}: the learning rate "
                f"stays constant from there on. Call set_total_steps({own}) on the scheduler to extend it",
                stacklevel=2,
            )

    def _is_stable(self) -> bool:
        """Return whether no step was taken in the cooldown, and the next one is at most its first."""
        if self.total_steps is None:
            return True
        return self.last_epoch <= self.total_steps - self._cooldown_of(self.total_steps)

    @override
    def get_lr(self) -> list[float | Tensor]:
        return self._get_closed_form_lr()

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        step = self.last_epoch + 1
        # SequentialLR calls this without a step(), to reset a scheduler to its start.
        self._steps_seen = observed_steps(self.optimizer)
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:  # added since the last call
            lr = group["lr"]
            peak = group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
            self.base_lrs = [*self.base_lrs, peak]  # a new list, because a state dict may hold the old one
        if self.decay == "one_cycle":
            momentum = one_cycle_momentum(*self._span(step), *self.momentum_range)
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                else:
                    group["momentum"] = momentum
        factor = self._factor(step)
        return [peak * factor for peak in self.base_lrs]

    def _factor(self, step: int) -> float:
        span = self._span(step)
        if self.decay == "one_cycle":
            return one_cycle(*span, self.start_factor, self.end_factor)
        if step < self.warmup_steps:
            return WARMUPS[self.warmup](step, self.warmup_steps, self.start_factor)
        match self.decay:
            case "cosine":
                return cosine_decay(*span, self.end_factor)
            case "polynomial":
                return polynomial_decay(*span, self.power, self.end_factor)
            case "inverse_sqrt":
                return inverse_sqrt_decay(step, self.warmup_steps)
            case "step":
                return step_decay(step, self.milestones, self.gamma)
            case "wsd":
                length = span[2] if self.total_steps is None else self.total_steps
                return wsd_decay(step, length, self._cooldown_of(length), self.cooldown, self.end_factor)
        return constant_decay(step)

    def _span(self, step: int) -> tuple[int, int, int]:
        total_steps = self.total_steps
        if total_steps is None:
            # Up to the peak, and in the first step, no curve depends on total_steps.
            if step > max(1, self.warmup_steps):
                raise RuntimeError(
                    "total_steps must be known after the warmup, got None: pass it, or call set_total_steps"
                )
            total_steps = max(step, self.warmup_steps) + 1
        return step, self.warmup_steps, total_steps

    def _cooldown_of(self, total_steps: int) -> int:
        if self.cooldown_steps is not None:
            return self.cooldown_steps
        return min(total_steps // 5, total_steps - self.warmup_steps)


def _warn_of_unscaled(optimizer: Optimizer) -> None:
    """Warn of groups with the ``lr_scale`` of layer-wise decay whose rates have not been multiplied by it."""
    groups = optimizer.param_groups
    scales = {group.get("lr_scale", 1.0) for group in groups}
    if len(scales) == 1:
        return
    rates = {float(group.get("initial_lr", group["lr"])) for group in groups}
    if len(rates) == 1 and rates != {0.0}:
        warnings.warn(
            f"WarmupDecayLR does not multiply by lr_scale, got groups with {len(scales)} different ones and "
            f"the same lr, {rates.pop():g}: layer_decay has no effect. Pass lr to param_groups too, or build "
            "the optimizer with build_optimizer(layer_decay=...)",
            stacklevel=3,
        )
