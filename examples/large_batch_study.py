"""How well do hyperparameters tuned at batch 128 transfer to 16 and 64 times the batch size?

    python examples/large_batch_study.py --seeds 5
    python examples/large_batch_study.py --seeds 5 --batch-sizes
    python examples/large_batch_study.py --models cnn mlp transformer --lr-window --variants

Uses Fashion-MNIST, from the folder --data-dir. Every optimizer is tuned at the small batch size, on
validation images, and transferred to the large ones by rule, for the same number of epochs; nothing is chosen
after seeing results of large batches. Prints tables, and writes all runs as CSV, and plots, to a folder; an
interrupted study resumes where it stopped.
"""

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import rich
from images import FASHION_MNIST
from study_report import (
    Row,
    plot_sizes,
    plot_windows,
    table_of_choices,
    table_of_results,
    table_of_windows,
)
from study_runs import RunCache, Settings
from study_training import Choice, Run

from lightning_lars.learning_rate.batch_scaling import ScalingRule

# Starting point of every optimizer, and the lowest rates of the grids, which grow by factors of 2. Weight
# decay has its customary value, and so has the rate of norms and biases for LARS and LAMB: the usual one of
# plain SGD and Adam.
STARTS = {
    "SGD": Choice("SGD", 0.0, weight_decay=5e-4),
    "AdamW": Choice("AdamW", 0.0, weight_decay=0.01),
    "LARS": Choice("LARS", 0.0, weight_decay=5e-4, excluded_lr=0.05),
    "LAMB": Choice("LAMB", 0.0, weight_decay=0.01, excluded_lr=0.01),
    "Bounded LAMB": Choice("Bounded LAMB", 0.0, weight_decay=0.01, excluded_lr=0.01),
    # Takes the rates of AdamW, which has all but the matrices of hidden layers, at the same one.
    "Muon": Choice("Muon", 0.0, weight_decay=0.01),
}
LOWEST_RATES = {"SGD": 0.05, "AdamW": 0.002, "LARS": 4.0, "LAMB": 0.005, "Bounded LAMB": 0.01, "Muon": 0.002}
RATES = 5
# Then one change at a time, most conservative first: the first that is as good as the best is chosen.
EXCLUDED_RATES = {
    "SGD": (0.05, None),
    "AdamW": (0.002, None),
    "LARS": (0.02, 0.05, 0.1),
    "LAMB": (0.005, 0.01, 0.02),
    "Bounded LAMB": (0.005, 0.01, 0.02),
    "Muon": (None,),
}
CLIPS = {
    "SGD": (1.0, None),
    "AdamW": (1.0, None),
    "LARS": (0.02, None),
    "LAMB": (1.0, None),
    "Bounded LAMB": (1.0, None),
    "Muon": (1.0, None),
}
TOLERANCE = 0.25  # points of accuracy that a single seed cannot resolve

WINDOW = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)  # times the transferred rate
TUNING_SEED = 0
FIRST_SEED = 11  # for the results: the exploration before this study used seeds 1 to 3


def choose(
    run_cache: RunCache, starts: Mapping[str, Choice], models: list[str], batch_size: int, rates: int
) -> dict[str, dict[str, Choice]]:
    """Tune every optimizer at one batch size, on the validation images.

    First the rate, for every network: :func:`middle_of_the_best`. Then, at that rate, for the first network
    alone, the rate of norms and biases and the clip, each on its own: :func:`first_of_the_best`.
    """
    grids = {
        name: [replace(start, lr=LOWEST_RATES[name] * 2.0**k, batch_size=batch_size) for k in range(rates)]
        for name, start in starts.items()
    }
    every_rate = [each for grid in grids.values() for each in grid]
    seen = _validate(run_cache, dict.fromkeys(models, every_rate), "Rates")
    chosen = {
        model: {
            name: replace(grid[0], lr=middle_of_the_best({each.lr: seen[model][each] for each in grid}))
            for name, grid in grids.items()
        }
        for model in models
    }
    first = models[0]
    of_rate, of_clip = (
        {
            name: [replace(chosen[first][name], **{key: value}) for value in values]
            for name, values in of.items()
            if name in starts
        }
        for key, of in (("excluded_lr", EXCLUDED_RATES), ("clip", CLIPS))
    )
    changes = [each for of in (of_rate, of_clip) for grid in of.values() for each in grid]
    seen[first] |= _validate(run_cache, {first: changes}, "Norms and biases, and clips,")[first]
    for name in starts:
        excluded_lr = first_of_the_best(of_rate[name], seen[first]).excluded_lr
        clip = first_of_the_best(of_clip[name], seen[first]).clip
        for model in models:
            chosen[model][name] = replace(chosen[model][name], excluded_lr=excluded_lr, clip=clip)
    for model in models:
        rich.print(table_of_choices(model, seen[model], chosen[model]))
    return chosen


def _validate(
    run_cache: RunCache, choices: dict[str, list[Choice]], description: str
) -> dict[str, dict[Choice, float]]:
    runs = {
        model: {each: Run(model, each, each.batch_size, TUNING_SEED) for each in of_model}
        for model, of_model in choices.items()
    }
    outcomes = run_cache(
        [run for of in runs.values() for run in of.values()], f"{description} at the small batch"
    )
    return {
        model: {each: outcomes[run].validation for each, run in of_model.items()}
        for model, of_model in runs.items()
    }


def middle_of_the_best(accuracy: Mapping[float, float]) -> float:
    """Return the geometric mean of the adjacent rates that match the best one, within the tolerance.

    This avoids both edges of what the small batch tolerates: low rates make slow progress, high ones diverge.
    """
    rates = sorted(accuracy)
    low = high = rates.index(max(rates, key=accuracy.__getitem__))
    bound = accuracy[rates[low]] - TOLERANCE
    while low > 0 and accuracy[rates[low - 1]] >= bound:
        low -= 1
    while high < len(rates) - 1 and accuracy[rates[high + 1]] >= bound:
        high += 1
    return math.sqrt(rates[low] * rates[high])


def first_of_the_best(choices: list[Choice], accuracy: Mapping[Choice, float]) -> Choice:
    """Return the first choice that is as good as the best, within the tolerance."""
    bound = max(accuracy[each] for each in choices) - TOLERANCE
    return next(each for each in choices if accuracy[each] >= bound)


Planned = list[tuple[str, list[Run]]]
"""Rows of a table before training: a name, and a run for every seed."""


def by_rule(model: str, best: Mapping[str, Choice], batch_size: int, seeds: range) -> Planned:
    """Transfer the choices to the large batch size."""
    reference, small = next(iter(best.items()))
    rows = [_row(f"{reference} at {small.batch_size}", model, small, small.batch_size, seeds, "none")]
    if "SGD" in best:
        rows.append(_row("Plain SGD, linear rule", model, plain(best["SGD"]), batch_size, seeds, "linear"))
    of_all = with_plain_sgd(best)
    return rows + [_row(name, model, choice, batch_size, seeds) for name, choice in of_all.items()]


def by_batch_size(model: str, best: Mapping[str, Choice], batch_sizes: list[int], seeds: range) -> Planned:
    """Transfer the choices to several batch sizes, for the same number of epochs."""
    return [
        _row(name, model, choice, size, seeds, "none" if size == choice.batch_size else "sqrt")
        for name, choice in with_plain_sgd(best).items()
        for size in batch_sizes
    ]


def by_rate(model: str, best: Mapping[str, Choice], batch_size: int, seeds: range) -> Planned:
    """Scan multiples of the transferred rate, for LARS with its clip and without it."""
    choices = with_plain_sgd(best)
    if "LARS" in best:
        clip = other_clip(best["LARS"])
        choices[f"LARS, clip {clip}"] = replace(best["LARS"], clip=clip)
    return [
        _row(name, model, replace(choice, lr=choice.lr * factor), batch_size, seeds)
        for name, choice in choices.items()
        for factor in WINDOW
    ]


def variants(model: str, best: Mapping[str, Choice], batch_size: int, seeds: range) -> Planned:
    """Change one setting at a time of LARS and LAMB at the large batch size, and the precision of Muon."""
    rows = []
    for name in [name for name in ("LARS", "LAMB") if name in best]:
        choice = best[name]
        clip = other_clip(choice)
        rows += [
            _row(name, model, choice, batch_size, seeds),
            _row(f"{name}, weight decay as it was", model, choice, batch_size, seeds, "sqrt", False),
            _row(f"{name}, cosine decay", model, replace(choice, decay="cosine"), batch_size, seeds),
            _row(f"{name}, clip {clip}", model, replace(choice, clip=clip), batch_size, seeds),
            _row(f"{name}, one rate for all", model, replace(choice, excluded_lr=None), batch_size, seeds),
            _row(f"{name}, exponent 0.75", model, choice, batch_size, seeds, 0.75),
        ]
    if "Muon" in best:
        choice = best["Muon"]
        in_bfloat16 = replace(choice, optimizer="Muon in bfloat16")
        rows += [
            _row("Muon", model, choice, batch_size, seeds),
            _row("Muon in bfloat16", model, in_bfloat16, batch_size, seeds),
        ]
    return rows


def other_clip(choice: Choice) -> float | None:
    """Return the clip that was not chosen."""
    return next(clip for clip in CLIPS[choice.optimizer] if clip != choice.clip)


def with_plain_sgd(best: Mapping[str, Choice]) -> dict[str, Choice]:
    """Return the choices, led by textbook SGD if SGD is among them."""
    return {**({"Plain SGD": plain(best["SGD"])} if "SGD" in best else {}), **best}


def plain(sgd: Choice) -> Choice:
    """Return textbook SGD: a single rate for all parameters, no clipping."""
    return replace(sgd, excluded_lr=None, clip=None)


def _row(
    name: str,
    model: str,
    choice: Choice,
    batch_size: int,
    seeds: range,
    rule: ScalingRule | float = "sqrt",
    scales_weight_decay: bool = True,
) -> tuple[str, list[Run]]:
    return name, [Run(model, choice, batch_size, seed, rule, scales_weight_decay) for seed in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["cnn", "mlp", "transformer"]
    parser.add_argument("--models", nargs="+", choices=names, default=["cnn"], help="the first has all parts")
    parser.add_argument("--seeds", type=int, default=5, help="seeds for every row of the result")
    parser.add_argument("--window-seeds", type=int, default=3, help="seeds for all other points")
    parser.add_argument("--base-batch-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--train-images", type=int, default=20480)
    parser.add_argument("--validation-images", type=int, default=20000)
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="fashion-mnist")
    parser.add_argument(
        "--data-dir", type=Path, default=FASHION_MNIST, help="folder of the Fashion-MNIST files"
    )
    parser.add_argument("--folder", type=Path, default=Path("large_batch_study"), help="for CSV and plots")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="parallel runs")
    parser.add_argument(
        "--accelerator", choices=["cpu", "gpu"], default="cpu", help="every process uses the first GPU"
    )
    parser.add_argument("--rates", type=int, default=RATES, help="rates per grid")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=list(STARTS),
        default=["SGD", "AdamW", "LARS", "LAMB"],
        help="Muon is for the matrices of hidden layers, beside AdamW; Bounded LAMB has a trust_clip",
    )
    parser.add_argument("--batch-sizes", action="store_true", help="also train at four batch sizes")
    parser.add_argument(
        "--lr-window", action="store_true", help="also scan learning rates at the large batch size"
    )
    parser.add_argument(
        "--variants", action="store_true", help="also change one setting at a time of LARS, LAMB and Muon"
    )
    arguments = parser.parse_args()

    data_dir = arguments.data_dir if arguments.dataset == "fashion-mnist" else None
    settings = Settings(
        arguments.epochs,
        data_dir,
        arguments.train_images,
        arguments.validation_images,
        arguments.accelerator,
    )
    folder, models = arguments.folder, arguments.models
    folder.mkdir(parents=True, exist_ok=True)
    run_cache = RunCache(settings, folder / "runs.csv", arguments.processes)
    base, large = arguments.base_batch_size, arguments.batch_size

    starts = {name: start for name, start in STARTS.items() if name in arguments.optimizers}
    best = choose(run_cache, starts, models, base, arguments.rates)
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    few = range(FIRST_SEED, FIRST_SEED + arguments.window_seeds)
    first, of_first = models[0], best[models[0]]
    sizes = [base, round(math.sqrt(base * large)), large, 4 * large]
    tables = {model: by_rule(model, best[model], large, seeds if model == first else few) for model in models}
    of_sizes = by_batch_size(first, of_first, sizes, few) if arguments.batch_sizes else []
    of_rates = by_rate(first, of_first, large, few) if arguments.lr_window else []
    of_variants = variants(first, of_first, large, few) if arguments.variants else []
    planned = [*(row for rows in tables.values() for row in rows), *of_sizes, *of_rates, *of_variants]
    outcomes = run_cache([run for _, runs in planned for run in runs], "By rule")

    def rows(of: Planned) -> list[Row]:
        return [Row(name, runs, [outcomes[run] for run in runs]) for name, runs in of]

    for model, of in tables.items():
        rich.print(table_of_results(rows(of), f"{model}, from {base} to {large} by rule"))
    if of_sizes:
        rich.print(table_of_results(rows(of_sizes), f"{first}, by batch size"))
        plot_sizes(rows(of_sizes), folder / "batch_sizes.png", arguments.epochs)
    if of_rates:
        rich.print(table_of_windows(rows(of_rates)))
        plot_windows(rows(of_rates), folder / "lr_window.png")
    if of_variants:
        rich.print(table_of_results(rows(of_variants), "One change at a time"))
    rich.print(f"CPU seconds of these {run_cache.number} runs: {run_cache.cpu_seconds:.0f}")


if __name__ == "__main__":
    main()
