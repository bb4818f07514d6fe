"""``python -m lightning_lars report``: writes the report of a run."""

import argparse
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

from lightning_lars.run_report.checkpoint import read_checkpoint
from lightning_lars.run_report.csv_log import read_csv_log
from lightning_lars.run_report.page import save_page
from lightning_lars.run_report.run import Run


def write_report(sources: Sequence[str | Path], output: str | Path, *, weights_only: bool = True) -> None:
    r"""Write a report of a finished run as one HTML file, which loads nothing.

    It shows learning rates, the layers' trust ratios as a heatmap with names and values on hover, the noise
    scale, all other metrics, the parameter groups, settings and versions, and what stands out, as far as the
    sources contain them.

    Args:
        sources: CSV logs of Lightning's ``CSVLogger`` (``metrics.csv``, or its folder), and checkpoints.
            Later ones take precedence.
        output: The file to write.
        weights_only: Whether checkpoints are read as by ``torch.load(weights_only=True)``.

    Raises:
        FileNotFoundError: If a source does not exist.
        OSError: If the output cannot be written.
        ValueError: If there is no source, or one is the output, or neither a CSV log nor a checkpoint of
            Lightning.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_lars.run_report.command import write_report
        >>> with TemporaryDirectory() as folder:
        ...     log, report = Path(folder, "metrics.csv"), Path(folder, "report.html")
        ...     _ = log.write_text("step,loss\n0,2.0\n10,1.0\n")
        ...     write_report([log], report)
        ...     print("loss" in report.read_text())
        True
    """
    if not sources:
        raise ValueError("sources must be at least one CSV log or checkpoint, got none")
    paths = [Path(source) for source in sources]
    if Path(output).resolve() in [path.resolve() for path in paths]:
        raise ValueError(f"output must be another file than the sources, got {output}, which is one of them")
    runs = [_read(path, weights_only=weights_only) for path in paths]
    try:
        save_page(reduce(Run.merged, runs), ", ".join(map(str, paths)), Path(output))
    except OSError as error:
        # That of a full disk names no file.
        raise OSError(error.errno, error.strerror, error.filename or str(output)) from error


def _read(path: Path, *, weights_only: bool) -> Run:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: pass the metrics.csv of a CSVLogger, or a checkpoint")
    if path.is_dir() or path.suffix.lower() == ".csv":
        return read_csv_log(path)
    return read_checkpoint(path, weights_only=weights_only)


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_lars report",
        description="Writes a report of a finished run as one HTML file, which loads nothing.",
    )
    parser.add_argument("sources", nargs="+", type=Path, help="metrics.csv of a CSVLogger, or a checkpoint")
    parser.add_argument("--output", "-o", type=Path, default=Path("report.html"), help="the file to write")
    parser.add_argument(
        "--weights-only",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read checkpoints without running code that they name",
    )
    given = parser.parse_args(arguments)
    try:
        write_report(given.sources, given.output, weights_only=given.weights_only)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {given.output}")
