"""Renders the parts of advice as tables and text."""

from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lightning_lars.advice.parts import BatchSize, CriticalBatchSize, ParameterGroup, StartingPoint


def batch_size_table(optimizer: str, rows: Sequence[BatchSize], suggested: int | None) -> Table:
    """Return the table of batch sizes; its columns of steps are left out if nothing was measured.

    Args:
        optimizer: Class names of the module's own optimizers.
        rows: At least one.
        suggested: The batch size to emphasize.
    """
    is_measured = rows[0].steps_factor is not None
    has_linear = rows[0].lr_linear is not None
    table = Table(title="Batch sizes", title_justify="left")
    table.add_column("Batch", justify="right")
    if is_measured:
        table.add_column("Steps", justify="right")
        table.add_column("Samples", justify="right")
    table.add_column(f"{optimizer} lr,\nsqrt rule", justify="right")
    if has_linear:
        table.add_column("linear\nrule", justify="right")
    for heading in ("recipes.lars,\nlr", "excluded\nlr", "recipes.lamb,\nlr", "excluded\nlr"):
        table.add_column(heading, justify="right")
    for row in rows:
        expected = [_steps(row), _samples(row)] if is_measured else []
        own = [_number(row.lr_sqrt), *([_number(row.lr_linear)] if has_linear else [])]
        style = "bold" if row.batch_size == suggested else None
        table.add_row(str(row.batch_size), *expected, *own, *_point(row.lars), *_point(row.lamb), style=style)
    return table


def group_table(optimizer: str, groups: Sequence[ParameterGroup]) -> Table:
    """Return the table of parameter groups."""
    table = Table(title=f"Parameter groups of {optimizer}", title_justify="left")
    table.add_column("Group", overflow="fold")
    for heading in ("Tensors", "Elements", "Layer adaptation", "Weight decay", "lr"):
        table.add_column(heading, justify="right")
    for group in groups:
        adapted = {True: "yes", False: "no", None: "-"}[group.layer_adaptation]
        numbers = adapted, _number(group.weight_decay), _number(group.lr)
        table.add_row(Text(group.name), str(group.tensors), f"{group.elements:,}", *numbers)
    return table


def memory_table(state_bytes: Mapping[str, int], parameter_bytes: int, measured: str | None) -> Table:
    """Return the table of the memory of state, by optimizer.

    Args:
        state_bytes: Bytes of the state of each optimizer.
        parameter_bytes: Bytes of the parameters.
        measured: The optimizer whose state was measured; the others' is computed.
    """
    table = Table(title="Memory of the optimizer's state, on a device", title_justify="left")
    table.add_column("Optimizer")
    table.add_column("Bytes", justify="right")
    table.add_column("Per parameter byte", justify="right")
    for name, size in state_bytes.items():
        own = " (measured)" if name == measured else ""
        share = f"{size / parameter_bytes:.2f}" if parameter_bytes else "-"
        table.add_row(Text(f"{name}{own}"), human_readable(size), share)
    return table


def human_readable(size: float) -> str:
    """Return bytes in the largest unit of which there is at least one.

    Example:
        >>> from lightning_lars.advice.table import human_readable
        >>> human_readable(900), human_readable(3 * 2**20)
        ('900 B', '3.0 MiB')
    """
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def in_samples(critical: CriticalBatchSize) -> str:
    """Return the critical batch size with its standard error, where it has one."""
    error = "" if critical.standard_error is None else f" ± {critical.standard_error:.2g}"
    return f"{critical.b_simple:.3g}{error} samples"


def bullets(title: str, sentences: Sequence[str]) -> Group:
    """Return a list of sentences under a title."""
    table = Table.grid(padding=(0, 1))
    for sentence in sentences:
        table.add_row("-", Text(sentence))
    return Group(Text(f"{title}:"), table)


def _steps(row: BatchSize) -> str:
    factor = f"{row.steps_factor:.2f}x"
    return factor if row.steps is None else f"{row.steps:,} ({factor})"


def _samples(row: BatchSize) -> str:
    factor = f"{row.samples_factor:.2f}x"
    return factor if row.samples is None else f"{row.samples:,} ({factor})"


def _point(point: StartingPoint) -> tuple[str, str]:
    return _number(point.lr), _number(point.excluded_lr)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
