"""What :func:`~lightning_lars.advise` returns."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import rich
from rich.console import Console

from lightning_lars.advice.parts import BatchSize, CriticalBatchSize, ParameterGroup, StartingPoint
from lightning_lars.advice.table import batch_size_table, bullets, group_table, in_samples, memory_table
from lightning_lars.printing.tables import print_table
from lightning_lars.rules import counted

__all__ = ["Advice", "BatchSize", "CriticalBatchSize", "ParameterGroup", "StartingPoint"]


@dataclass(frozen=True)
class Advice:
    """What to expect of larger batch sizes, from a short run at a small one.

    Example:
        >>> from lightning_lars.advice.report import Advice
        >>> print(Advice.__dataclass_fields__["unknown"].type)
        tuple[str, ...]
    """

    optimizer: str
    """Class name of the module's optimizer."""
    batch_size: int
    """Effective batch size of the module's own Trainer."""
    base_batch_size: int
    """Batch size that the module's learning rate is for, from ``BatchSizeScaling`` or else ``batch_size``."""
    measured_steps: int
    """Optimizer steps of the short run."""
    steps: int | None
    """Optimizer steps of the whole run at the module's own batch size; None where it has no end."""
    critical: CriticalBatchSize | None
    """None if nothing was measured."""
    suggested_batch_size: int | None
    """The multiple of ``batch_size`` by a power of 2 that is closest to the critical one, at least
    ``batch_size`` itself; None if nothing was measured."""
    batch_sizes: tuple[BatchSize, ...]
    """Multiples of ``batch_size`` by powers of 2."""
    groups: tuple[ParameterGroup, ...]
    parameter_bytes: int
    """Bytes of the parameters that are trained."""
    state_bytes: dict[str, int]
    """Bytes of optimizer state on one device, by optimizer, measured for the module's own and computed for
    others."""
    unusual: tuple[str, ...]
    """What is unusual in the groups, in sentences."""
    unknown: tuple[str, ...]
    """What remains unknown, in sentences."""

    def print(self, console: Console | None = None) -> None:
        """Print the advice as tables.

        Args:
            console: Where to; None is ``rich.get_console()``.
        """
        console = console or rich.get_console()
        console.print(self._headline(), highlight=False)
        print_table(console, batch_size_table(self.optimizer, self.batch_sizes, self.suggested_batch_size))
        print_table(console, group_table(self.optimizer, self.groups))
        measured = self.optimizer if self.measured_steps else None
        print_table(console, memory_table(self.state_bytes, self.parameter_bytes, measured))
        for title, sentences in (("Unusual", self.unusual), ("Not known", self.unknown)):
            if sentences:
                console.print(bullets(title, sentences), highlight=False)

    def to_json(self) -> str:
        """Return the advice as JSON, with the names of the attributes as keys.

        JSON has no infinity and no NaN: such numbers, of an optimizer with ``lr=inf`` for example, are null.
        """
        return json.dumps(_finite(asdict(self)), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Advice":
        """Return the advice that :meth:`to_json` has written.

        Raises:
            TypeError: If a key is missing or unknown.
        """
        values: dict[str, Any] = json.loads(text)
        critical = values["critical"]
        if critical is not None:
            history = tuple((step, b_simple) for step, b_simple in critical["history"])
            values["critical"] = CriticalBatchSize(**{**critical, "history": history})
        values["batch_sizes"] = tuple(
            BatchSize(**{**each, **{key: StartingPoint(**each[key]) for key in ("lars", "lamb")}})
            for each in values["batch_sizes"]
        )
        values["groups"] = tuple(ParameterGroup(**each) for each in values["groups"])
        values |= {key: tuple(values[key]) for key in ("unusual", "unknown")}
        return cls(**values)

    def _headline(self) -> str:
        """Return the critical batch size, and what follows from it, in two sentences."""
        critical = self.critical
        if critical is None or critical.b_simple is None:
            return "Critical batch size: unknown."
        text = (
            f"Critical batch size: about {in_samples(critical)}, from {counted(self.measured_steps, 'step')}."
        )
        if self.suggested_batch_size != self.batch_size:
            return f"{text} Batch size to try: {self.suggested_batch_size}."
        twice = self.batch_sizes[1]
        return (
            f"{text} Twice the batch size, {twice.batch_size}, would take {twice.steps_factor:.0%} of the "
            f"steps and {twice.samples_factor:.0%} of the samples."
        )


def _finite(value: Any) -> Any:
    """Return a value of a dict with None for all numbers in it that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
