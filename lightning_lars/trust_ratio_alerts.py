"""What is wrong with a layer whose trust ratio is not as it should be, said once."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from lightning_lars.name_folding import fold
from lightning_lars.peak_rate import Peak
from lightning_lars.step_statistics import OverSteps

PATIENCE = 3
"""Looks in a row at which something must hold that a single step may do by chance."""

FAR = 100.0
"""Factor from the median layer at which a trust ratio is told to be far from it."""

NEGLIGIBLE = 5e-4
"""Peak of ``trust_coefficient * lr`` below which LARS hardly moves a layer: 0.05 % of its norm in a step."""

LONG_WAY = 10.0
"""How many times its norm a layer moves in trainings that are long enough for such a peak: all steps added
up, as if each were as long as the longest."""

NAMES = 4
"""Names in a message; what is more is counted."""

CAUSES = {
    "non-finite": (
        "trust ratios that are not finite, as weights or gradients are not: {layers}. Lower the learning "
        "rate, warm up for longer, or set max_grad_norm"
    ),
    "clip": (
        "trust ratios at trust_clip in every step: {layers}. The clip, not the layer, decides how far it "
        "moves: widen trust_clip or leave it out, unless that is meant"
    ),
    "far": (
        "trust ratios far from that of the median layer ({median:.3g}): {layers}. Name in exclude what "
        "should not be adapted, or look at how it is initialized"
    ),
    "frozen": (
        "weights that do not move, at a learning rate above 0: {layers}. Gradients are zero, or steps are "
        "lost in rounding (precision='bf16-true': use 'bf16-mixed')"
    ),
}
"""Messages, with the layers and their trust ratios in them."""


class TrustRatioAlerts:
    """Looks at what the steps did, and returns a message for each cause that is new, with its layers.

    Args:
        is_resumed: Whether there were steps before, so that the learning rate may be past its peak.
    """

    def __init__(self, is_resumed: bool = False) -> None:
        self._told: set[tuple[str, str]] = set()
        self._in_a_row: Counter[tuple[str, str]] = Counter()
        self._is_resumed = is_resumed

    def look(self, quantities: Mapping[str, Mapping[str, OverSteps]]) -> list[str]:
        """Return new messages about layers.

        Args:
            quantities: What :meth:`~lightning_lars.step_statistics.StepStatistics.take` returned.
        """
        ratios = {layer: ratio.mean for layer, ratio in quantities.get("trust_ratio", {}).items()}
        finite = [ratio for ratio in ratios.values() if math.isfinite(ratio)]
        typical = median(finite) if finite else math.nan
        found: list[tuple[str, str]] = []
        lasting: list[tuple[str, str]] = []
        for layer, ratio in ratios.items():
            clipped = quantities.get("at_trust_clip", {}).get(layer)
            no_scale = quantities.get("at_zero_rule", {}).get(layer)
            effective_lr = quantities.get("effective_lr", {}).get(layer)
            update = quantities.get("update_to_weight", {}).get(layer)
            if not math.isfinite(ratio):
                found.append(("non-finite", layer))
                continue
            if clipped and clipped.mean == 1:
                lasting.append(("clip", layer))
            elif typical and not (no_scale and no_scale.mean) and not 1 / FAR < ratio / typical < FAR:
                lasting.append(("far", layer))
            if update and update.maximum == 0 and effective_lr and effective_lr.maximum > 0:
                lasting.append(("frozen", layer))
        self._in_a_row = Counter({key: self._in_a_row[key] + 1 for key in lasting})
        found += [key for key in lasting if self._in_a_row[key] >= PATIENCE]
        new: defaultdict[str, list[str]] = defaultdict(list)
        for cause, layer in found:
            if (cause, layer) not in self._told:
                self._told.add((cause, layer))
                new[cause].append(layer)
        return [
            CAUSES[cause].format(layers=_named([(layer, ratios[layer]) for layer in layers]), median=typical)
            for cause, layers in new.items()
        ]

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
            f"trust_coefficient * lr was {peak.value:.3g} at its peak: before momentum, no layer moves by "
            f"more than about {100 * peak.value:.2g} % of its norm in a step. LARS usually needs a larger "
            "learning rate than SGD: 1 to 10 and more with trust_coefficient=1e-3"
        ]


def _named(layers: Sequence[tuple[str, float]]) -> str:
    """Return names and trust ratios of layers, folded and counted where they are many."""
    if len(layers) <= NAMES:
        return ", ".join(f"{layer!r} ({ratio:.3g})" for layer, ratio in layers)
    ratios = [ratio for _, ratio in layers]
    spread = f" ({min(ratios):.3g} to {max(ratios):.3g})" if all(map(math.isfinite, ratios)) else ""
    folded = fold((layer, None) for layer, _ in layers)
    hidden = sum(count for _, count, _ in folded[NAMES:])
    names = ", ".join(repr(name) for name, *_ in folded[:NAMES])
    return f"{len(layers)} layers{spread}: {names}{f' and {hidden} more' if hidden else ''}"
