"""Prints tables to terminals, files and notebooks."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def is_too_wide(console: Console, table: Table) -> bool:
    """Return whether a table is wider than the terminal."""
    return _has_width(console) and _width(console, table) > console.width


def print_table(console: Console, table: Table) -> None:
    """Print a table, at its full width where no terminal limits it."""
    if not _has_width(console):
        # A file has no width for which names would have to be truncated; a notebook scrolls.
        table.width = _width(console, table)
    console.print(table, crop=False)


def _has_width(console: Console) -> bool:
    return console.is_terminal and not console.is_jupyter


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum
