"""What is wrong with a layer whose trust ratio is not as it should be, said once."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from lightning_lars.printing.name_folding import fold
from lightning_lars.trust_ratios.peak_rate import Peak
from lightning_lars.trust_ratios.step_statistics import OverSteps

PATIENCE = 3
"""Looks in a row at which something must hold that a single step may do by chance."""

FAR = 100.0
"""Factor from the median layer at which a trust ratio is told to be far from it."""

NEGLIGIBLE = 5e-4
"""Peak of ``trust_coefficient * lr`` below which LARS hardly moves a layer: 0.05 % of its norm in a step."""

LONG_WAY = 10.0
"""How many times its norm a layer moves in trainings that are long enough for such a peak: all steps added
up, as if each were as long as the longest."""

LOST = 0.1
"""Share of its norm that a layer must lose to weight decay alone, in steps that follow each other."""

FROM_ZERO = {"SGD": 0.5, "Adam": 0.05}
"""Learning rates above which a first step of plain SGD or Adam may throw a training back."""

NAMES = 4
"""Names in a message; what is more is counted."""

CAUSES = {
    "non-finite": (
        "trust ratios that are not finite, as weights or gradients are not: {layers}. Lower the learning "
        "rate, warm up for longer, or set max_grad_norm"
    ),
    "clip": (
        "trust ratios at trust_clip in every step since training began: {layers}. The clip, not the layer, "
        "decides how far it moves: widen trust_clip or leave it out, unless that is meant"
    ),
    "far": (
        "trust ratios far from that of the median layer ({median:.3g}): {layers}. Name in exclude what "
        "should not be adapted, or look at how it is initialized"
    ),
    "frozen": (
        "weights that do not move, at a learning rate above 0: {layers}. Gradients are zero or next to "
        "it, or steps are lost in rounding (precision='bf16-true': use 'bf16-mixed')"
    ),
    "decay": (
        "layers that weight decay alone moves, as they have no gradient: {layers}. The trust ratio makes "
        "these steps as long as any others, however weak the decay is, and the layers shrink. Pass "
        "decoupled_weight_decay=True, where they lose lr * weight_decay a step, freeze what is not used, or "
        "leave it without a gradient (zero_grad(set_to_none=True))"
    ),
    "from zero": (
        "layers whose weights were all zero, by their learning rate then: {layers}. They have no scale to "
        "adapt to: their first step was that of plain {plain}, at a rate that may throw the training back. "
        "Pass trust_clip={clip}, which bounds the trust ratio of 1 that they have then, initialize them with "
        "other values, or exclude them and set excluded_lr"
    ),
}
"""Messages, with the layers in them and what is wrong with each, which is a trust ratio as a rule."""


class TrustRatioAlerts:
    """Looks at what the steps did, and returns a message for each cause that is new, with its layers.

    Args:
        is_resumed: Whether there were steps before, so that the learning rate may be past its peak.
        plain: What the optimizer is without adaptation, ``"SGD"`` or ``"Adam"``.
        clip_is_rule: Whether it is the rule that layers are at their clip, as in LARC.
    """

    def __init__(self, is_resumed: bool = False, plain: str = "SGD", clip_is_rule: bool = False) -> None:
        self._plain = plain
        self._looks_at_clip = not (is_resumed or clip_is_rule)
        self._unclipped: set[str] = set()
        self._lost: dict[str, float] = {}
        self._told: set[tuple[str, str]] = set()
        self._in_a_row: Counter[tuple[str, str]] = Counter()
        self._is_resumed = is_resumed

    def look(self, quantities: Mapping[str, Mapping[str, OverSteps]]) -> list[str]:
        """Return new messages about layers.

        Args:
            quantities: What ``StepStatistics.take`` returned.
        """
        ratios = {layer: ratio.mean for layer, ratio in quantities.get("trust_ratio", {}).items()}
        finite = [ratio for ratio in ratios.values() if math.isfinite(ratio)]
        typical = median(finite) if finite else math.nan
        found: list[tuple[str, str]] = []
        lasting: list[tuple[str, str]] = []
        for layer, ratio in ratios.items():
            of_layer = {quantity: layers[layer] for quantity, layers in quantities.items() if layer in layers}
            if not math.isfinite(ratio):
                found.append(("non-finite", layer))
                continue
            if self._loses_to_decay(layer, of_layer):
                found.append(("decay", layer))
            lasting += [(cause, layer) for cause in _causes(of_layer, typical)]
            if self._is_clipped_from_the_start(layer, of_layer):
                lasting.append(("clip", layer))
        self._in_a_row = Counter({key: self._in_a_row[key] + 1 for key in lasting})
        found += [key for key in lasting if self._in_a_row[key] >= PATIENCE]
        rates = {layer: lr.maximum for layer, lr in quantities.get("lr_from_zero", {}).items()}
        return [*self._messages(found, ratios, typical), *self.look_at_first_steps(rates)]

    def look_at_first_steps(self, lr_from_zero: Mapping[str, float]) -> list[str]:
        """Return a message about layers whose first step, from zero, was so long that it may do harm.

        Args:
            lr_from_zero: By layer, its effective learning rate in a step from zero weights, else 0.
        """
        # Rates come in single precision.
        limit = FROM_ZERO[self._plain] * (1 + 1e-6)
        found = [layer for layer, lr in lr_from_zero.items() if lr > limit]
        return self._messages([("from zero", layer) for layer in found], lr_from_zero)

    def _messages(
        self, found: Sequence[tuple[str, str]], values: Mapping[str, float], typical: float = math.nan
    ) -> list[str]:
        """Return what has not been told, a message for each cause."""
        new: defaultdict[str, list[str]] = defaultdict(list)
        for cause, layer in found:
            if (cause, layer) not in self._told:
                self._told.add((cause, layer))
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

    def _is_clipped_from_the_start(self, layer: str, of_layer: Mapping[str, OverSteps]) -> bool:
        """Tell whether a layer has never been adapted; a clip that begins to hold later is of use."""
        clipped = of_layer.get("at_trust_clip")
        if clipped is None or clipped.mean < 1 or not self._looks_at_clip:
            self._unclipped.add(layer)
        return layer not in self._unclipped and _is_telling(of_layer)

    def _loses_to_decay(self, layer: str, of_layer: Mapping[str, OverSteps]) -> bool:
        alone, lost = of_layer.get("by_decay_alone"), of_layer.get("lost_to_decay")
        if alone is None or lost is None or alone.mean <= 0.5:
            self._lost.pop(layer, None)
            return False
        self._lost[layer] = self._lost.get(layer, 0.0) + lost.mean * lost.steps
        return self._lost[layer] >= LOST

    def look_at_peak(
        self, peak: Peak, total_steps: float, plain_rate: Callable[[], float] = lambda: 0.0
    ) -> list[str]:
        """Return a message if the learning rate was negligible at its peak, when that has passed.

        Args:
            peak: Of ``trust_coefficient * lr`` inside the steps.
            total_steps: Of the whole training; infinite if it has no end.
            plain_rate: Returns what it is without warmup, as far as that is known.
        """
        is_negligible = 0 < peak.value < NEGLIGIBLE and peak.value * total_steps < LONG_WAY
        if not is_negligible or ("negligible", "") in self._told:
            return []
        if not peak.has_passed(total_steps, is_resumed=self._is_resumed, plain=plain_rate()):
            return []
        self._told.add(("negligible", ""))
        return [
            f"trust_coefficient * lr is {peak.value:.3g} at its peak, so no layer moves by more than about "
            f"{100 * peak.value:.2g} % of its norm in a step, before momentum. LARS needs a larger learning "
            "rate than SGD: 1 to 10 and more with trust_coefficient=1e-3"
        ]


def _causes(of_layer: Mapping[str, OverSteps], typical: float) -> Iterator[str]:
    """Yield what is wrong with a layer whose ratio is finite, where it lasts."""
    ratio, clipped = of_layer["trust_ratio"].mean, of_layer.get("at_trust_clip")
    is_clipped = clipped is not None and clipped.mean == 1
    update, effective_lr = of_layer.get("update_to_weight"), of_layer.get("effective_lr")
    if _is_telling(of_layer) and not is_clipped and typical and not 1 / FAR < ratio / typical < FAR:
        yield "far"
    if update and update.maximum == 0 and effective_lr and effective_lr.maximum > 0:
        yield "frozen"


def _is_telling(of_layer: Mapping[str, OverSteps]) -> bool:
    """Tell whether the ratio says something of the layer: not without weights, or without a gradient."""
    flags = (of_layer.get(quantity) for quantity in ("at_zero_rule", "by_decay_alone"))
    return not any(flag.mean for flag in flags if flag)


def _named(layers: Sequence[tuple[str, float]]) -> str:
    """Return names and values of layers, folded and counted where they are many."""
    if len(layers) <= NAMES:
        return ", ".join(f"{layer!r} ({ratio:.3g})" for layer, ratio in layers)
    ratios = [ratio for _, ratio in layers]
    spread = f" ({min(ratios):.3g} to {max(ratios):.3g})" if all(map(math.isfinite, ratios)) else ""
    folded = fold((layer, None) for layer, _ in layers)
    hidden = sum(count for _, count, _ in folded[NAMES:])
    names = ", ".join(repr(name) for name, *_ in folded[:NAMES])
    return f"{len(layers)} layers{spread}: {names}{f' and {hidden} more' if hidden else ''}"
