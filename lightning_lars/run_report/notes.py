"""What stands out in the numbers of a run, in sentences."""

import math
from collections.abc import Iterator, Mapping
from statistics import median

from lightning_lars.run_report.run import Points, Run

FAR = 30.0
"""Factor between the mean of a layer and that of the median layer that is worth a sentence."""
_NAMES = 4
SHARES = {
    "at_trust_clip": "{share:.0%} of the layers were at trust_clip in the last log: the clip, not the layer, "
    "determines how far they move.",
    "at_zero_rule": "{share:.0%} of the layers had a trust ratio of 1 by the zero rule in the last log: "
    "their weights, or their gradients, are 0.",
    "by_decay_alone": "{share:.0%} of the layers were moved by weight decay alone in the last log: they have "
    "no gradient, and shrink.",
}
"""Sentences on the shares of layers that the monitor logs, by their names."""


def notes(run: Run) -> list[str]:
    """Return what stands out.

    Example:
        >>> from lightning_lars.run_report.notes import notes
        >>> from lightning_lars.run_report.run import Run
        >>> notes(Run(metrics={"loss": {0: 1.0, 10: float("nan")}}))
        ['loss is not finite from step 10 on.']
    """
    return [
        *run.alerts,
        *_not_finite(run.metrics),
        *_shares(run.metrics),
        *_of_layers(run.layers.get("trust_ratio", {})),
    ]


def _not_finite(metrics: Mapping[str, Points]) -> Iterator[str]:
    for key, points in metrics.items():
        is_finite = {step: math.isfinite(value) for step, value in points.items()}
        steps = [step for step, finite in is_finite.items() if not finite]
        if not steps:
            continue
        if not any(finite for step, finite in is_finite.items() if step > steps[0]):
            yield f"{key} is not finite from step {steps[0]} on."
        else:
            yield f"{key} is not finite in {len(steps)} of {len(points)} values, first at step {steps[0]}."


def _shares(metrics: Mapping[str, Points]) -> Iterator[str]:
    for key, points in metrics.items():
        folder, _, name = key.rpartition("/")
        if folder.startswith("trust_ratio") and name in SHARES and points:
            share = list(points.values())[-1]
            if share > 0:
                yield SHARES[name].format(share=share)


def _of_layers(layers: Mapping[str, Points]) -> Iterator[str]:
    broken = [name for name, points in layers.items() if not all(map(math.isfinite, points.values()))]
    if broken:
        yield f"Trust ratios of {_list(broken)} are not finite: their weights or gradients are not."
    means = {
        name: sum(points.values()) / len(points)
        for name, points in layers.items()
        if points and name not in broken
    }
    typical = median(means.values()) if means else 0.0
    if typical > 0:
        far = [name for name, mean in means.items() if not 1 / FAR < mean / typical < FAR]
        if far:
            yield f"Trust ratios of {_list(far)} are far from {typical:.3g}, that of the median layer."


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return f"{', '.join(names[:_NAMES])}{more}"
