"""Draw every warmup and decay of WarmupDecayLR into docs/schedules.png.

python docs/plot_schedules.py
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from lightning_lars import LARS, WarmupDecayLR

PICTURE = Path(__file__).with_name("schedules.png")
WARMUP_STEPS, TOTAL_STEPS = 20, 100
FIRST, SECOND, MOMENTUM = "#08519c", "#4a98c9", "#c2410c"
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1}

# Arguments of each curve, its label, and the position of the label (left, bottom).
WARMUPS = {
    "constant": [({"start_factor": 0.1}, "start_factor\n= 0.1", (4, 0.14))],
    "linear": [({}, "start_factor\n= 0", (15.5, 0.1)), ({"start_factor": 0.25}, "0.25", (2, 0.6))],
    "exponential": [
        ({"start_factor": 0.01}, "start_factor\n= 0.01", (15.5, 0.1)),
        ({"start_factor": 0.25}, "0.25", (2.5, 0.45)),
    ],
    "cosine": [({}, "start_factor\n= 0", (15.5, 0.1)), ({"start_factor": 0.25}, "0.25", (2, 0.54))],
}
DECAYS = {
    "cosine": [({}, "end_factor = 0", (23, 0.05)), ({"end_factor": 0.2}, "0.2", (88, 0.27))],
    "polynomial": [({"power": 2.0}, "power = 2", (23, 0.05)), ({"power": 1.0}, "1", (66, 0.5))],
    "inverse_sqrt": [({}, "", (0, 0))],
    "step": [
        ({"milestones": [50, 75]}, "gamma = 0.1", (53, 0.115)),
        ({"milestones": [50, 75], "gamma": 0.5}, "0.5", (60, 0.52)),
    ],
    "wsd": [
        ({"cooldown_steps": 30}, "cooldown = linear", (23, 0.55)),
        ({"cooldown_steps": 30, "cooldown": "sqrt"}, "sqrt", (62, 0.4)),
    ],
}


def train(steps: int, **arguments: Any) -> tuple[list[float], list[float]]:
    """Return the learning rate, as a share of its peak, and the momentum of each step."""
    optimizer = LARS([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = WarmupDecayLR(optimizer, WARMUP_STEPS, TOTAL_STEPS, **arguments)
    group = optimizer.param_groups[0]
    rates, momenta = [], []
    for _ in range(steps):
        rates.append(group["lr"])
        momenta.append(group["momentum"])
        optimizer.step()
        scheduler.step()
    return rates, momenta


def draw(axes: Axes, title: str, steps: int, variants: list[Any], **arguments: Any) -> None:
    """Draw a curve for each variant, with a dot at each step."""
    for (options, label, position), color in zip(variants, (FIRST, SECOND), strict=False):
        rates, _ = train(steps, **arguments, **options)
        axes.plot(range(1, steps + 1), rates, ".-", color=color, markersize=3.5, linewidth=1.5)
        axes.text(*position, label, color=color, va="bottom", bbox=LABEL, zorder=1)
    axes.set_title(title, fontweight="bold")
    axes.set_xlim(0, steps)
    axes.set_xticks(range(0, steps + 1, steps // 5 if steps == TOTAL_STEPS else 10))
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.axvline(WARMUP_STEPS, color="0.75", linewidth=1, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def draw_one_cycle(axes: Axes) -> None:
    """Draw the learning rate and, on a separate axis, the momentum."""
    arguments = {"warmup": "cosine", "decay": "one_cycle"}
    draw(axes, "decay: one_cycle", TOTAL_STEPS, [({}, "learning rate", (37, 0.94))], **arguments)
    _, momenta = train(TOTAL_STEPS, **arguments)
    momentum_axes = axes.twinx()
    momentum_axes.plot(
        range(1, TOTAL_STEPS + 1), momenta, ".-", color=MOMENTUM, markersize=3.5, linewidth=1.5
    )
    momentum_axes.text(33, 0.8395, "momentum", color=MOMENTUM, va="bottom")
    momentum_axes.set_ylim(0.835, 0.962)
    momentum_axes.set_yticks([0.85, 0.9, 0.95])
    momentum_axes.tick_params(axis="y", colors=MOMENTUM)
    momentum_axes.spines[["top", "left"]].set_visible(False)
    momentum_axes.spines["right"].set_color(MOMENTUM)


def main() -> None:
    """Write the picture."""
    plt.rcParams.update({"font.size": 11.5, "axes.titlesize": 12})
    figure = plt.figure(figsize=(10, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 2])
    for axes, (shape, variants) in zip(top.subplots(1, 4, sharey=True), WARMUPS.items(), strict=True):
        draw(axes, f"warmup: {shape}", 30, variants, warmup=shape, decay="constant")
    decay_axes = bottom.subplots(2, 3).flat
    for axes, (shape, variants) in zip(decay_axes, DECAYS.items(), strict=False):
        draw(axes, f"decay: {shape}", TOTAL_STEPS, variants, decay=shape)
    draw_one_cycle(decay_axes[-1])
    bottom.supxlabel("optimizer step")
    for part in (top, bottom):
        part.supylabel("share of the peak")
    figure.savefig(PICTURE, dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    main()
