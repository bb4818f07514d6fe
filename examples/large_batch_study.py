"""How far does a learning rate that was found at batch 128 carry, at 16 times the batch and as many epochs?

    python examples/large_batch_study.py --seeds 3
    python examples/large_batch_study.py --model mlp --lr-window --critical-batch-size

The images are Fashion-MNIST's; --data-dir names their folder. Every optimizer is tuned at the small batch, on
validation images, and transferred to the large one by rule; nothing is chosen after the large batch was seen,
except in the one row that says so. Prints tables, and leaves all runs as CSV, and pictures, in a folder; a
study that was interrupted goes on where it stopped.
"""

import argparse
import dataclasses
import math
import os
import statistics
from pathlib import Path

import rich
from images import FASHION_MNIST
from study_report import (
    Row,
    plot_factors,
    plot_results,
    plot_windows,
    table_of_choices,
    table_of_factors,
    table_of_results,
    table_of_windows,
)
from study_runs import Settings, Trainings
from study_training import Choice, Run

# What is chosen at the small batch: first a rate, with the first scale, then one change at a time. What LARS
# excludes is plain SGD, whose rates are about a thousandth of those of LARS.
RATES = {
    "SGD": (0.05, 0.1, 0.2, 0.4, 0.8),
    "AdamW": (0.001, 0.002, 0.004, 0.008, 0.016),
    "LARS": (2.0, 4.0, 8.0, 16.0, 32.0),
    "LAMB": (0.005, 0.01, 0.02, 0.04, 0.08),
}
EXCLUDED_LR_SCALES = {
    "SGD": (1.0, 0.1),
    "AdamW": (1.0, 0.1),
    "LARS": (0.01, 0.1, 1.0),
    "LAMB": (1.0, 0.1),
}
OPTIONS = {"SGD": (("nesterov", True),), "LARS": (("denominator", "momentum"),)}

# What is transferred, and by which rule.
ROWS = (
    ("SGD, linear rule", "SGD", "linear"),
    ("SGD, square-root rule", "SGD", "sqrt"),
    ("AdamW, square-root rule", "AdamW", "sqrt"),
    ("LARS, square-root rule", "LARS", "sqrt"),
    ("LAMB, square-root rule", "LAMB", "sqrt"),
)
RE_TUNING = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # times the rate of the small batch

WINDOWS = {
    "SGD": [0.0125 * 2**k for k in range(8)],
    "AdamW": [0.001 * 2**k for k in range(9)],
    "LARS": [2.0 * 2**k for k in range(9)],
    "LAMB": [0.005 * 2**k for k in range(8)],
}
TUNING_SEED = 0  # the results have seeds of their own, from 1


def choose(
    trainings: Trainings, batch_size: int, rates: dict[str, tuple[float, ...]], tolerance: float
) -> dict[str, Choice]:
    """Tune every optimizer at one batch size, on the validation images: see :func:`lowest_of_the_best`."""
    first = [
        Choice(name, rate, EXCLUDED_LR_SCALES[name][0], batch_size=batch_size)
        for name, of_name in rates.items()
        for rate in of_name
    ]
    seen = _validate(trainings, first, "Learning rates at the small batch")
    second = []
    for best in lowest_of_the_best(seen, tolerance).values():
        scales = EXCLUDED_LR_SCALES[best.optimizer][1:]
        second += [dataclasses.replace(best, excluded_lr_scale=scale) for scale in scales]
        second += [dataclasses.replace(best, options=(each,)) for each in OPTIONS.get(best.optimizer, ())]
    seen |= _validate(trainings, second, "Options at the small batch")
    best = lowest_of_the_best(seen, tolerance)
    rich.print(table_of_choices(seen, best, {name: (min(of), max(of)) for name, of in rates.items()}))
    return best


def _validate(trainings: Trainings, choices: list[Choice], description: str) -> dict[Choice, float]:
    runs = {choice: Run("choice", choice, choice.batch_size, TUNING_SEED) for choice in choices}
    outcomes = trainings(runs.values(), description)
    return {choice: outcomes[run].validation for choice, run in runs.items()}


def lowest_of_the_best(seen: dict[Choice, float], tolerance: float) -> dict[str, Choice]:
    """Return, for every optimizer, the lowest learning rate within a tolerance of its best accuracy.

    Of several choices with that rate, the one with the lowest for what is excluded, and of those the best.
    Without a tolerance, that is the best of all.
    """
    chosen = {}
    for name in dict.fromkeys(choice.optimizer for choice in seen):
        of_name = {choice: accuracy for choice, accuracy in seen.items() if choice.optimizer == name}
        bound = max(of_name.values()) - tolerance
        near = [choice for choice, accuracy in of_name.items() if accuracy >= bound]
        chosen[name] = min(near, key=lambda each: (each.lr, each.excluded_lr_scale, -seen[each]))
    return chosen


def critical_batch_size(trainings: Trainings, choice: Choice) -> list[float]:
    """Return the noise scale after every epoch of a training at the batch size of the choice."""
    run = Run("noise scale", choice, choice.batch_size, TUNING_SEED, accumulated_batches=2)
    (outcome,) = trainings([run], "Noise scale at the small batch").values()
    return list(outcome.noise_scales)


def noise_scale_exponent(noise_scale: float, base: int, batch_size: int) -> float:
    """Return the exponent with which ``(batch_size / base) ** exponent`` is McCandlish et al.'s factor.

    Their best learning rate is ``lr_max / (1 + noise_scale / batch_size)`` (2018, equation 2.6).
    """
    factor = (1 + noise_scale / base) / (1 + noise_scale / batch_size)
    return math.log(factor) / math.log(batch_size / base)


def study(
    trainings: Trainings, best: dict[str, Choice], noise_scale: float, batch_size: int, seeds: int
) -> list[Row]:
    """Transfer what was chosen to the large batch."""
    sgd = best["SGD"]
    tuned = [dataclasses.replace(sgd, lr=sgd.lr * k, batch_size=batch_size) for k in RE_TUNING]
    runs = {choice: Run("upper bound", choice, batch_size, TUNING_SEED) for choice in tuned}
    outcomes = trainings(runs.values(), "SGD, re-tuned at the large batch")
    upper_bound = max(runs, key=lambda choice: outcomes[runs[choice]].validation)

    exponent = noise_scale_exponent(noise_scale, sgd.batch_size, batch_size)
    named = [
        (f"SGD at {sgd.batch_size}", sgd, sgd.batch_size, "none"),
        *((name, best[optimizer], batch_size, rule) for name, optimizer, rule in ROWS[:2]),
        ("SGD, by the noise scale", sgd, batch_size, round(exponent, 3)),
        *((name, best[optimizer], batch_size, rule) for name, optimizer, rule in ROWS[2:]),
        (f"SGD, re-tuned at {batch_size}: upper bound", upper_bound, batch_size, "none"),
    ]
    of_row = {
        name: [Run("result", choice, size, seed, rule) for seed in range(1, seeds + 1)]
        for name, choice, size, rule in named
    }
    outcomes = trainings([run for runs in of_row.values() for run in runs], "Results")
    return [Row(name, runs, [outcomes[run] for run in runs]) for name, runs in of_row.items()]


def lr_window(
    trainings: Trainings, best: dict[str, Choice], batch_size: int
) -> dict[str, dict[float, float]]:
    """Return, for every optimizer, its accuracy by learning rate at the large batch."""
    runs = {
        (name, rate): Run(
            "window", dataclasses.replace(choice, lr=rate, batch_size=batch_size), batch_size, TUNING_SEED
        )
        for name, choice in best.items()
        for rate in WINDOWS[name]
    }
    outcomes = trainings(runs.values(), "Windows of learning rates")
    found: dict[str, dict[float, float]] = {name: {} for name in best}
    for (name, rate), run in runs.items():
        found[name][rate] = outcomes[run].validation
    return found


def factors(trainings: Trainings, sgd: Choice, batch_sizes: list[int]) -> dict[int, dict[float, float]]:
    """Return how SGD does at every batch size and multiple of the rate of the small batch."""
    runs = {
        (size, factor): Run(
            "factors",
            dataclasses.replace(sgd, lr=sgd.lr * factor, batch_size=size),
            size,
            TUNING_SEED,
        )
        for size in batch_sizes
        for factor in [2.0**k for k in range(-4, round(math.log2(size / sgd.batch_size)) + 1)]
    }
    outcomes = trainings(runs.values(), "Learning rates of SGD by batch size")
    found: dict[int, dict[float, float]] = {}
    for (size, factor), run in runs.items():
        found.setdefault(size, {})[factor] = outcomes[run].validation
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["cnn", "mlp"], default="cnn", help="with batch norm, or no norm")
    parser.add_argument("--seeds", type=int, default=3, help="trainings behind every row of the result")
    parser.add_argument("--lr-window", action="store_true", help="scan learning rates at the large batch too")
    parser.add_argument(
        "--critical-batch-size", action="store_true", help="scan learning rates of SGD at batches between too"
    )
    parser.add_argument("--base-batch-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="choose the lowest rate within so many points of the best, not the best",
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--train-images", type=int, default=20480)
    parser.add_argument("--validation-images", type=int, default=20000)
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="fashion-mnist")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="of the Fashion-MNIST files")
    parser.add_argument("--folder", type=Path, default=Path("large_batch_study"), help="for CSV and pictures")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    parser.add_argument("--rates", type=int, help="rates of every grid to try (for a look: the first 1 or 2)")
    arguments = parser.parse_args()

    data_dir = arguments.data_dir if arguments.dataset == "fashion-mnist" else None
    settings = Settings(
        arguments.model, arguments.epochs, data_dir, arguments.train_images, arguments.validation_images
    )
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    trainings = Trainings(settings, folder / "runs.csv", arguments.processes)
    base, batch_size = arguments.base_batch_size, arguments.batch_size

    best = choose(
        trainings,
        base,
        {name: rates[: arguments.rates] for name, rates in RATES.items()},
        arguments.tolerance,
    )
    noise_scales = critical_batch_size(trainings, best["SGD"])
    noise_scale = statistics.median(noise_scales)
    by_epoch = ", ".join(f"{each:.0f}" for each in noise_scales)
    rich.print(f"Noise scale of SGD at batch {base}, after every epoch: {by_epoch}; median {noise_scale:.0f}")
    rows = study(trainings, best, noise_scale, batch_size, arguments.seeds)
    rich.print(table_of_results(rows))
    plot_results(rows, folder / "results.png", f"{arguments.model.upper()}, {arguments.epochs} epochs")
    if arguments.lr_window:
        found_rates = lr_window(trainings, best, batch_size)
        rich.print(table_of_windows(found_rates, batch_size))
        plot_windows(found_rates, batch_size, folder / "lr_window.png")
    if arguments.critical_batch_size:
        sizes = [base * 2**k for k in range(1, round(math.log2(batch_size / base)) + 1)]
        found = factors(trainings, best["SGD"], sizes)
        predicted = {size: (size / base) ** noise_scale_exponent(noise_scale, base, size) for size in sizes}
        rich.print(table_of_factors(found, base, predicted))
        plot_factors(found, base, predicted, noise_scale, folder / "critical_batch_size.png")
    rich.print(f"CPU seconds of all runs in {folder / 'runs.csv'}: {trainings.cpu_seconds:.0f}")


if __name__ == "__main__":
    main()
