"""Reads the log that Lightning's ``CSVLogger`` writes."""

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any, cast

from lightning_lars.run_report.run import Points, Run

_PER_LAYER = "_per_layer/"


def read_csv_log(path: Path) -> Run:
    """Read ``metrics.csv``, and ``hparams.yaml`` where it lies beside it.

    Args:
        path: The file, or the folder that has it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a CSV in UTF-8, has no column ``step``, or a value that is not a number.
    """
    path = path / "metrics.csv" if path.is_dir() else path
    metrics: dict[str, Points] = {}
    layers: dict[str, dict[str, Points]] = {}
    for row in _rows(path):
        step = _step(path, row.pop("step") or "0")
        for key, text in row.items():
            if not text or key == "epoch":
                continue
            quantity, is_per_layer, layer = key.partition(_PER_LAYER)
            points = (
                layers.setdefault(quantity, {}).setdefault(layer, {})
                if is_per_layer
                else metrics.setdefault(key, {})
            )
            try:
                points[step] = float(text)
            except ValueError as error:
                raise ValueError(f"{path} must hold numbers, got {text!r} as {key!r}") from error
    return Run(
        metrics={key: dict(sorted(metrics[key].items())) for key in sorted(metrics, key=_natural)},
        layers={
            quantity: {name: dict(sorted(of[name].items())) for name in sorted(of, key=_natural)}
            for quantity, of in layers.items()
        },
        settings=_hyperparameters(path.with_name("hparams.yaml")),
    )


def _text(path: Path) -> str:
    try:
        # With or without the mark that spreadsheets put in front.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a CSV log of Lightning, which is in UTF-8: {error}") from error


def _rows(path: Path) -> Iterator[dict[str, str]]:
    reader = csv.DictReader(StringIO(_text(path), newline=""))
    try:
        if "step" not in (reader.fieldnames or ()):
            raise ValueError(
                f"{path} must be a CSV log of Lightning, with a column 'step', got the columns "
                f"{reader.fieldnames}: pass the metrics.csv of a CSVLogger"
            )
        for row in reader:
            # Of a row that is too long, the rest is under None.
            if cast(Any, row).pop(None, None) is not None:
                raise ValueError(
                    f"{path} must have a column for every value, got more in line {reader.line_num}"
                )
            yield row
    except csv.Error as error:
        raise ValueError(f"{path} must be a CSV log of Lightning: {error}") from error


def _step(path: Path, text: str) -> int:
    with suppress(ValueError):
        # Other programs that have written the file again make it a float.
        step = float(text)
        if step.is_integer():
            return int(step)
    raise ValueError(f"{path} must hold integers in the column 'step', got {text!r}")


def _hyperparameters(path: Path) -> dict[str, str]:
    """Return the lines of the file, without reading YAML: values may be of any class."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip() not in ("", "{}")]
    settings: dict[str, str] = {}
    last = ""
    for line in lines:
        key, colon, value = line.partition(":")
        if colon and not line.startswith((" ", "-")):
            last = key
            settings[key] = value.strip()
        elif last:
            settings[last] = f"{settings[last]} {line.strip()}".strip()
    return settings


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders names by the numbers in them; the log orders them by character."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
