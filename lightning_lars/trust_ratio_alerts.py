"""What is wrong with a layer whose trust ratio is not as it should be, said once."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median

from lightning_lars.step_statistics import OverSteps

PATIENCE = 3
"""Looks in a row at which something must hold that a single step may do by chance."""

FAR = 100.0
"""Factor from the median layer at which a trust ratio is told to be far from it."""

NEGLIGIBLE = 1e-3
"""What ``trust_coefficient * lr`` must reach for LARS to move any layer: 0.1 % of its norm in a step."""

PLATEAU = 500
"""Looks without a higher learning rate after which it is taken to have reached its peak."""


class TrustRatioAlerts:
    """Looks at what the steps did, and returns a message for each layer and cause that is new."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()
        self._in_a_row: Counter[tuple[str, str]] = Counter()
        self._peak = 0.0
        self._since_peak = 0

    def look(self, quantities: Mapping[str, Mapping[str, OverSteps]]) -> list[str]:
        """Return new messages about layers.

        Args:
            quantities: What :meth:`~lightning_lars.step_statistics.StepStatistics.take` returned.
        """
        ratios = {layer: ratio.mean for layer, ratio in quantities.get("trust_ratio", {}).items()}
        finite = [ratio for ratio in ratios.values() if math.isfinite(ratio)]
        typical = median(finite) if finite else math.nan
        found: dict[tuple[str, str], str] = {}
        lasting: dict[tuple[str, str], str] = {}
        for layer, ratio in ratios.items():
            clipped = quantities.get("at_trust_clip", {}).get(layer)
            no_scale = quantities.get("at_zero_rule", {}).get(layer)
            effective_lr = quantities.get("effective_lr", {}).get(layer)
            update = quantities.get("update_to_weight", {}).get(layer)
            if not math.isfinite(ratio):
                found[layer, "non-finite"] = (
                    f"the trust ratio of layer {layer!r} is {ratio}: its weights or gradients are not "
                    "finite. Lower the learning rate, warm up for longer, or set max_grad_norm"
                )
                continue
            if clipped and clipped.mean == 1:
                lasting[layer, "clip"] = (
                    f"the trust ratio of layer {layer!r} ({ratio:.3g}) is at trust_clip in every step: the "
                    "clip, not the layer, decides how far it moves. Raise trust_clip, or lower "
                    "trust_coefficient"
                )
            elif typical and not (no_scale and no_scale.mean) and not 1 / FAR < ratio / typical < FAR:
                lasting[layer, "far"] = (
                    f"the trust ratio of layer {layer!r} ({ratio:.3g}) is far from that of the median layer "
                    f"({typical:.3g}): exclude it (exclude={layer!r}), or look at how it is initialized"
                )
            if update and update.maximum == 0 and effective_lr and effective_lr.maximum > 0:
                lasting[layer, "frozen"] = (
                    f"the weights of layer {layer!r} do not move, at an effective learning rate of "
                    f"{effective_lr.mean:.3g}: its gradients are zero, or its steps are lost in rounding "
                    "(precision='bf16-true': use 'bf16-mixed')"
                )
        self._in_a_row = Counter({key: self._in_a_row[key] + 1 for key in lasting})
        found.update({key: text for key, text in lasting.items() if self._in_a_row[key] >= PATIENCE})
        new = {key: text for key, text in found.items() if key not in self._told}
        self._told |= new.keys()
        return list(new.values())

    def look_at_peak(self, rates: Sequence[tuple[float, float]], is_over: bool = False) -> list[str]:
        """Return a message if the learning rate was negligible at its peak, when the peak is known.

        Args:
            rates: Learning rate inside the step and ``trust_coefficient`` of each adapted group.
            is_over: Whether training has ended.
        """
        now = max((lr * coefficient for lr, coefficient in rates), default=0.0)
        self._since_peak = 0 if now > self._peak else self._since_peak + 1
        self._peak = max(self._peak, now)
        is_past = is_over or now < self._peak or self._since_peak >= PLATEAU
        if not is_past or not 0 < self._peak < NEGLIGIBLE or ("", "negligible") in self._told:
            return []
        self._told.add(("", "negligible"))
        return [
            f"trust_coefficient * lr is {self._peak:.3g} at its peak, so no layer moves by more than about "
            f"{100 * self._peak:.2g} % of its norm in a step. LARS needs a larger learning rate than SGD: "
            "1 to 10 and more with trust_coefficient=1e-3"
        ]
