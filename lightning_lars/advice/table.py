"""Prints advice as tables."""

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from lightning_lars.advice.report import Advice, BatchSize, CriticalBatchSize, StartingPoint
from lightning_lars.printing.tables import print_table


def print_advice(console: Console, advice: Advice) -> None:
    """Print the advice.

    Args:
        console: Where to.
        advice: What :func:`~lightning_lars.advise` returns.
    """
    console.print(headline(advice), highlight=False)
    print_table(console, batch_size_table(advice))
    print_table(console, group_table(advice))
    print_table(console, memory_table(advice))
    for title, sentences in (("Unusual", advice.unusual), ("Not known", advice.unknown)):
        if sentences:
            console.print(_bullets(title, sentences), highlight=False)


def headline(advice: Advice) -> str:
    """Return the critical batch size, and what follows from it, in two sentences."""
    critical = advice.critical
    if critical is None or critical.b_simple is None:
        return "Critical batch size: unknown."
    text = f"Critical batch size: about {_critical(critical)} samples, from {advice.measured_steps} steps."
    if advice.suggested_batch_size != advice.batch_size:
        return f"{text} Batch size to try: {advice.suggested_batch_size}."
    twice = advice.batch_sizes[1]
    return (
        f"{text} Twice the batch size, {twice.batch_size}, would take {twice.steps_factor:.0%} of the steps "
        f"and {twice.samples_factor:.0%} of the samples."
    )


def batch_size_table(advice: Advice) -> Table:
    """Return the table of batch sizes; its columns of steps are left out if nothing was measured."""
    is_measured = advice.batch_sizes[0].steps_factor is not None
    has_linear = advice.batch_sizes[0].lr_linear is not None
    table = Table(title="Batch sizes", title_justify="left")
    table.add_column("Batch", justify="right")
    if is_measured:
        table.add_column("Steps", justify="right")
        table.add_column("Samples", justify="right")
    table.add_column(f"{advice.optimizer} lr,\nsqrt rule", justify="right")
    if has_linear:
        table.add_column("linear\nrule", justify="right")
    for heading in ("recipes.lars,\nlr", "excluded\nlr", "recipes.lamb,\nlr", "excluded\nlr"):
        table.add_column(heading, justify="right")
    for row in advice.batch_sizes:
        expected = [_steps(row), _samples(row)] if is_measured else []
        own = [_number(row.lr_sqrt), *([_number(row.lr_linear)] if has_linear else [])]
        style = "bold" if row.batch_size == advice.suggested_batch_size else None
        table.add_row(str(row.batch_size), *expected, *own, *_point(row.lars), *_point(row.lamb), style=style)
    return table


def group_table(advice: Advice) -> Table:
    """Return the table of parameter groups."""
    table = Table(title=f"Parameter groups of {advice.optimizer}", title_justify="left")
    table.add_column("Group", overflow="fold")
    for heading in ("Tensors", "Elements", "Layer adaptation", "Weight decay", "lr"):
        table.add_column(heading, justify="right")
    for group in advice.groups:
        adapted = {True: "yes", False: "no", None: "-"}[group.layer_adaptation]
        numbers = adapted, _number(group.weight_decay), _number(group.lr)
        table.add_row(Text(group.name), str(group.tensors), f"{group.elements:,}", *numbers)
    return table


def memory_table(advice: Advice) -> Table:
    """Return the table of the memory of state."""
    table = Table(title="Memory of the optimizer's state, on a device", title_justify="left")
    table.add_column("Optimizer")
    table.add_column("Bytes", justify="right")
    table.add_column("Of the parameters'", justify="right")
    for name, size in advice.state_bytes.items():
        own = " (measured)" if name == advice.optimizer and advice.measured_steps else ""
        share = f"{size / advice.parameter_bytes:.2f}" if advice.parameter_bytes else "-"
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


def _critical(critical: CriticalBatchSize) -> str:
    error = "" if critical.standard_error is None else f" ± {critical.standard_error:.2g}"
    return f"{critical.b_simple:.3g}{error}"


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


def _bullets(title: str, sentences: tuple[str, ...]) -> Group:
    table = Table.grid(padding=(0, 1))
    for sentence in sentences:
        table.add_row("-", Text(sentence))
    return Group(Text(f"{title}:"), table)
