"""Warnings about layers with abnormal trust ratios, each reported once."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from lightning_lars.printing.name_folding import fold
from lightning_lars.trust_ratios.layer_statistics import OverSteps
from lightning_lars.trust_ratios.peak_rate import Peak

PATIENCE = 3
"""Consecutive checks before a condition that may arise by chance is reported."""

FAR = 100.0
"""Factor from the median layer beyond which a trust ratio is reported as far from it."""

NEGLIGIBLE = 5e-4
"""Peak of ``trust_coefficient * lr`` below which LARS barely moves a layer: 0.05 % of its norm per step."""

LONG_WAY = 10.0
"""Total movement, in multiples of a layer's norm, of runs that are long enough for such a peak: the number of
steps times the longest step."""

LOST = 0.1
"""Fraction of its norm that a layer must lose to weight decay alone, in consecutive steps, to be reported."""

FROM_ZERO = {"SGD": 0.5, "Adam": 0.05}
"""Learning rates above which a first step of plain SGD or Adam may set a run back."""

NAMES = 4
"""Names listed in a message; further ones are counted."""

CAUSES = {
    "non-finite": (
        "trust ratios that are not finite, because weights or gradients are not: {layers}. Lower the "
        "learning rate, warm up for longer, or set max_grad_norm"
    ),
    "update": (
        "updates that are not finite, because weights or gradients are not: {layers}. Lower the learning "
        "rate, warm up for longer, or clip gradients"
    ),
    "clip": (
        "trust ratios at trust_clip in every step since training began: {layers}. The clip, not the layer, "
        "determines how far it moves: widen or remove trust_clip, unless this is intended"
    ),
    "far": (
        "trust ratios far from that of the median layer ({median:.3g}): {layers}. Add layers that should "
        "not be adapted to exclude, or check their initialization"
    ),
    "frozen": (
        "weights that do not move, at a learning rate above 0: {layers}. Gradients are zero or nearly so, "
        "or steps are lost in rounding (precision='bf16-true': use 'bf16-mixed')"
    ),
    "decay": (
        "layers that weight decay alone moves, because they have no gradient: {layers}. The trust ratio "
        "makes these steps as long as any others, however weak the decay is, and the layers shrink. Pass "
        "decoupled_weight_decay=True, with which they lose lr * weight_decay per step, freeze unused layers, "
        "or leave them without a gradient (zero_grad(set_to_none=True))"
    ),
    "from zero": (
        "layers whose weights were all zero, with their learning rate in that step: {layers}. They have no "
        "scale to adapt to: their first step was that of plain {plain}, at a rate that may set the run back. "
        "Pass trust_clip={clip}, which bounds their trust ratio of 1 in that step, initialize them with "
        "other values, or exclude them and set excluded_lr"
    ),
}
"""Message templates; ``layers`` lists the layers with a value for each, usually the trust ratio."""


class TrustRatioAlerts:
    """Checks the statistics of steps, and returns a message for each new cause, with the affected layers.

    Args:
        is_resumed: Whether the run was resumed, so that the learning rate may be past its peak.
        plain: The optimizer without adaptation, ``"SGD"`` or ``"Adam"``.
        clip_is_rule: Whether layers are expected to be at their clip, as in LARC.
    """

    def __init__(self, is_resumed: bool = False, plain: str = "SGD", clip_is_rule: bool = False) -> None:
        self._plain = plain
        self._checks_clip = not (is_resumed or clip_is_rule)
        self._unclipped: set[str] = set()
        self._lost: dict[str, float] = {}
        self._reported: set[tuple[str, str]] = set()
        self._in_a_row: Counter[tuple[str, str]] = Counter()
        self._is_resumed = is_resumed

    def check(self, quantities: Mapping[str, Mapping[str, OverSteps]]) -> list[str]:
        """Return new messages about layers.

        Args:
            quantities: Statistics from ``StepStatistics.flush``.
        """
        ratios = {layer: ratio.mean for layer, ratio in quantities.get("trust_ratio", {}).items()}
        finite = [ratio for ratio in ratios.values() if math.isfinite(ratio)]
        typical = median(finite) if finite else math.nan
        found: list[tuple[str, str]] = []
        lasting: list[tuple[str, str]] = []
        for layer, ratio in ratios.items():
            statistics = {
                quantity: values[layer] for quantity, values in quantities.items() if layer in values
            }
            if not math.isfinite(ratio):
                found.append(("non-finite", layer))
                continue
            if self._loses_to_decay(layer, statistics):
                found.append(("decay", layer))
            lasting += [(cause, layer) for cause in _causes(statistics, typical)]
            if self._is_clipped_from_the_start(layer, statistics):
                lasting.append(("clip", layer))
        self._in_a_row = Counter({key: self._in_a_row[key] + 1 for key in lasting})
        found += [key for key in lasting if self._in_a_row[key] >= PATIENCE]
        if not ratios:
            ratios = {layer: update.mean for layer, update in quantities.get("update_to_weight", {}).items()}
            found += [("update", layer) for layer, update in ratios.items() if not math.isfinite(update)]
        rates = {layer: lr.maximum for layer, lr in quantities.get("lr_from_zero", {}).items()}
        return [*self._messages(found, ratios, typical), *self.check_first_steps(rates)]

    def check_first_steps(self, lr_from_zero: Mapping[str, float]) -> list[str]:
        """Return a message about layers whose first step, from zero weights, was harmfully long.

        Args:
            lr_from_zero: By layer, the effective learning rate of a step from zero weights, else 0.
        """
        # Rates are in single precision.
        limit = FROM_ZERO[self._plain] * (1 + 1e-6)
        found = [layer for layer, lr in lr_from_zero.items() if lr > limit]
        return self._messages([("from zero", layer) for layer in found], lr_from_zero)

    def _messages(
        self, found: Sequence[tuple[str, str]], values: Mapping[str, float], typical: float = math.nan
    ) -> list[str]:
        """Return one message for each cause, about layers not yet reported for it."""
        new: defaultdict[str, list[str]] = defaultdict(list)
        for cause, layer in found:
            if (cause, layer) not in self._reported:
                self._reported.add((cause, layer))
                new[cause].append(layer)
        return [
            CAUSES[cause].format(
                layers=_named([(layer, values[layer]) for layer in layers]),
                median=typical,
                plain=self._plain,
                clip={"SGD": 0.01, "Adam": 0.1}[self._plain],
            )
            for cause, layers in new.items()
        ]

    def _is_clipped_from_the_start(self, layer: str, statistics: Mapping[str, OverSteps]) -> bool:
        """Return whether a layer has always been at its clip; a clip that takes effect later is useful."""
        clipped = statistics.get("at_trust_clip")
        if clipped is None or clipped.mean < 1 or not self._checks_clip:
            self._unclipped.add(layer)
        return layer not in self._unclipped and _is_informative(statistics)

    def _loses_to_decay(self, layer: str, statistics: Mapping[str, OverSteps]) -> bool:
        alone, lost = statistics.get("by_decay_alone"), statistics.get("lost_to_decay")
        if alone is None or lost is None or alone.mean <= 0.5:
            self._lost.pop(layer, None)
            return False
        self._lost[layer] = self._lost.get(layer, 0.0) + lost.mean * lost.steps
        return self._lost[layer] >= LOST

    def check_peak(
        self, peak: Peak, total_steps: float, plain_rate: Callable[[], float] = lambda: 0.0
    ) -> list[str]:
        """Return a message if the learning rate was negligible at its peak, once that has passed.

        Args:
            peak: Peak of ``trust_coefficient * lr`` inside the steps.
            total_steps: Steps of the whole run; infinite if it has no end.
            plain_rate: Returns the rate without warmup, as far as it is known.
        """
        is_negligible = 0 < peak.value < NEGLIGIBLE and peak.value * total_steps < LONG_WAY
        if not is_negligible or ("negligible", "") in self._reported:
            return []
        if not peak.has_passed(total_steps, is_resumed=self._is_resumed, plain=plain_rate()):
            return []
        self._reported.add(("negligible", ""))
        return [
            f"trust_coefficient * lr is {peak.value:.3g} at its peak, so no layer moves by more than about "
            f"{100 * peak.value:.2g} % of its norm in a step, before momentum. LARS needs a larger learning "
            "rate than SGD: 1 to 10 and more with trust_coefficient=1e-3"
        ]


def _causes(statistics: Mapping[str, OverSteps], typical: float) -> Iterator[str]:
    """Yield the conditions of a layer with a finite ratio that are reported if they persist."""
    ratio, clipped = statistics["trust_ratio"].mean, statistics.get("at_trust_clip")
    is_clipped = clipped is not None and clipped.mean == 1
    update, effective_lr = statistics.get("update_to_weight"), statistics.get("effective_lr")
    if _is_informative(statistics) and not is_clipped and typical and not 1 / FAR < ratio / typical < FAR:
        yield "far"
    if update and update.maximum == 0 and effective_lr and effective_lr.maximum > 0:
        yield "frozen"


def _is_informative(statistics: Mapping[str, OverSteps]) -> bool:
    """Return whether the ratio characterizes the layer: not with zero weights, or without a gradient."""
    flags = (statistics.get(quantity) for quantity in ("at_zero_rule", "by_decay_alone"))
    return not any(flag.mean for flag in flags if flag)


def _named(layers: Sequence[tuple[str, float]]) -> str:
    """Format names and values of layers, folded and counted if there are many."""
    if len(layers) <= NAMES:
        return ", ".join(f"{layer!r} ({ratio:.3g})" for layer, ratio in layers)
    ratios = [ratio for _, ratio in layers]
    spread = f" ({min(ratios):.3g} to {max(ratios):.3g})" if all(map(math.isfinite, ratios)) else ""
    folded = fold((layer, None) for layer, _ in layers)
    hidden = sum(count for _, count, _ in folded[NAMES:])
    names = ", ".join(repr(name) for name, *_ in folded[:NAMES])
    return f"{len(layers)} layers{spread}: {names}{f' and {hidden} more' if hidden else ''}"
