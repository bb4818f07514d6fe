"""Prints the parameters of every optimizer, with their groups and the rules behind them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from lightning_lars.combined.combined_optimizer import parts_of
from lightning_lars.groups.contents import (
    FROZEN,
    LOST,
    Entry,
    entries_of,
    groups_by_name,
    reads_layer_adaptation,
)
from lightning_lars.groups.excluded_rate import part_of
from lightning_lars.groups.matrices import MATRICES
from lightning_lars.groups.optimizer_names import kinds
from lightning_lars.printing.name_folding import fold
from lightning_lars.printing.tables import is_too_wide, print_table
from lightning_lars.rules import FLAG, as_int, counted, is_whole, require
from lightning_lars.trainer.callback import Callback
from lightning_lars.trust_ratios.excluded_rate_peak import ExcludedRatePeak
from lightning_lars.trust_ratios.protocols import HasTrustRatios


class ParamGroupSummary(Callback):
    """Prints the parameter groups of the Trainer's optimizers when training starts.

    It shows the groups as they are at that moment, whoever built them: after callbacks have regrouped them,
    and after a checkpoint has been loaded. ``lr`` is the schedule's value at that time, without the factors
    that ``LearningRateWarmup`` and ``BatchSizeScaling`` apply inside the step. Shapes are the shapes
    of whole layers, sharded or not.

    The reason for excluding a parameter is the rule of :func:`~lightning_lars.param_groups`, for groups with
    its names; ``own rule`` where its defaults would have decided otherwise, and ``-`` for other groups.
    Layer adaptation is ``-`` for an optimizer that does not read the key ``layer_adaptation``, such as Adam
    or another package's LAMB: whether that adapts a group is its own rule.

    Parameters that require a gradient but are in no optimizer come first, with a warning.

    Prints on rank 0, through ``rich.get_console()``, at full width unless that is a terminal. It also prints
    with ``Trainer(enable_model_summary=False)`` and ``barebones=True``, because printing is its only purpose.

    While training, it warns once if LARS moves excluded parameters at a learning rate above 1, at which plain
    SGD rarely trains, or LAMB above 0.05, the same for plain Adam. This is the rate inside the steps, after
    warmup and scaling.

    Args:
        fold: Whether parameters of repeated blocks share a row, as in ``layer1.[0-2].bn[1-3].{weight,bias}``,
            if the rest of the row is the same.
        max_rows: Maximum number of rows, at least 1, or -1 for all. The totals count all parameters.

    Example:
        >>> import lightning
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_lars import LARS, ParamGroupSummary, build_optimizer
        >>> class Model(BoringModel):
        ...     def configure_optimizers(self):
        ...         return build_optimizer(self, LARS, lr=0.3, weight_decay=1e-6)
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> quiet |= dict(enable_model_summary=False, accelerator="cpu", devices=1)
        >>> lightning.Trainer(max_steps=1, callbacks=[ParamGroupSummary()], **quiet).fit(Model())
        Parameter groups of LARS
        ┏━━━━━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━┳━━━━━━┓
        ┃ Parameter    ┃ Module ┃ Shape   ┃ Tensors ┃ Group    ┃ Why  ┃
        ┡━━━━━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━╇━━━━━━┩
        │ layer.weight │ Linear │ (2, 32) │       1 │ adapted  │      │
        │ layer.bias   │ Linear │ (2,)    │       1 │ excluded │ bias │
        └──────────────┴────────┴─────────┴─────────┴──────────┴──────┘
        ┏━━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━┓
        ┃ Group    ┃ Tensors ┃ Elements ┃ Layer adaptation ┃ Weight decay ┃  lr ┃
        ┡━━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━┩
        │ adapted  │       1 │       64 │              yes │        1e-06 │ 0.3 │
        │ excluded │       1 │        2 │               no │            0 │ 0.3 │
        └──────────┴─────────┴──────────┴──────────────────┴──────────────┴─────┘
    """

    def __init__(self, fold: bool = True, max_rows: int = 100) -> None:
        FLAG.check("fold", fold)
        allowed = is_whole(max_rows) and (max_rows == -1 or max_rows > 0)
        require("max_rows", "an integer above 0, or -1 for all", max_rows, allowed)
        self.fold = fold
        self.max_rows = as_int(max_rows)
        self._excluded: list[ExcludedRatePeak] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        groups = groups_by_name(trainer.optimizers)
        # On every rank, because it may call code of the model that communicates with other ranks.
        entries = entries_of(pl_module, groups)
        if not trainer.is_global_zero:
            return
        console = rich.get_console()
        table = _parameter_table(entries, self.fold, self.max_rows, narrow=False)
        if is_too_wide(console, table):
            table = _parameter_table(entries, self.fold, self.max_rows, narrow=True)
        console.print(
            f"Parameter groups of {', '.join(kinds(trainer.optimizers)) or 'no optimizer'}", highlight=False
        )
        print_table(console, table)
        parts = parts_of(trainer.optimizers)
        others = [each for each in parts if not reads_layer_adaptation(each)]
        unread = [group for each in others for group in each.param_groups]
        print_table(console, _group_table(entries, groups, unread))
        # The name of the group of matrices promises nothing about their adaptation.
        split = [each for each in others if any(part_of(g) not in ("", MATRICES) for g in each.param_groups)]
        if split:
            console.print(
                f"{', '.join(kinds(split))} does not read layer_adaptation: the groups set weight decay and "
                "learning rate, and whether a layer is adapted is the optimizer's own rule.",
                highlight=False,
                soft_wrap=True,
            )
        lost = [entry.name for entry in entries if entry.group == LOST]
        if lost:
            rank_zero_warn(
                f"{counted(len(lost), 'parameter')} with requires_grad=True in no optimizer, among them "
                f"{lost[:5]}: pass them to one in configure_optimizers, or freeze them with "
                "requires_grad_(False)"
            )

        self._detach()
        with_ratios: list[Any] = [each for each in parts if isinstance(each, HasTrustRatios)]
        self._excluded = list(map(ExcludedRatePeak, with_ratios))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_logged = (batch_idx + 1) % max(1, cast(Any, trainer).log_every_n_steps) == 0
        self._check_excluded(each for each in self._excluded if is_logged or each.is_on_host())

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_excluded(self._excluded)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _check_excluded(self, peaks: Iterable[ExcludedRatePeak]) -> None:
        for peak in peaks:
            message = peak.message()
            if message is not None:
                rank_zero_warn(message)

    def _detach(self) -> None:
        for peak in self._excluded:
            peak.detach()
        self._excluded = []


def _parameter_table(entries: Sequence[Entry], folded: bool, max_rows: int, narrow: bool) -> Table:
    """Return the table of parameters; if narrow, with module and shape below the name."""
    # Parameters that no optimizer trains come first, where no limit hides them; frozen ones are only counted.
    entries = sorted((e for e in entries if e.group != FROZEN), key=lambda e: e.group != LOST)
    rows = [(e.name, (e.module, e.shape, e.group, e.why)) for e in entries]
    names = fold(rows) if folded else [(name, 1, same) for name, same in rows]
    limit = len(names) if max_rows == -1 else max_rows
    table = Table()
    for heading in ("Parameter", *(() if narrow else ("Module", "Shape")), "Tensors", "Group", "Why"):
        table.add_column(heading, justify="right" if heading == "Tensors" else "left", overflow="fold")
    for name, tensors, (module, shape, group, why) in names[:limit]:
        described = [f"{name}\n  {module} {shape}"] if narrow else [name, module, shape]
        style = "dim" if part_of({"name": group}) == "excluded" else None
        style = "bold red" if group == LOST else style
        table.add_row(*(Text(cell) for cell in (*described, str(tensors), group, why)), style=style)
    if names[limit:]:
        hidden = sum(tensors for _, tensors, _ in names[limit:])
        rest = f"and {counted(len(names) - limit, 'more row')}: see max_rows"
        table.add_row(rest, *(() if narrow else ("", "")), str(hidden), style="italic")
    return table


def _group_table(
    entries: Sequence[Entry], groups: Mapping[str, dict[str, Any]], unread: Sequence[dict[str, Any]]
) -> Table:
    """Return the table of groups; those in ``unread`` have no layer adaptation to show."""
    tensors, elements = Counter[str](), Counter[str]()
    for entry in entries:
        tensors[entry.group] += 1
        elements[entry.group] += entry.elements
    table = Table()
    table.add_column("Group", overflow="fold")
    for heading in ("Tensors", "Elements", "Layer adaptation", "Weight decay", "lr"):
        table.add_column(heading, justify="right", overflow="fold")
    for name in (*groups, LOST, FROZEN):
        if name in groups or tensors[name]:
            group = groups.get(name, {})
            adaptation = None if any(group is each for each in unread) else group.get("layer_adaptation")
            settings = [adaptation, group.get("weight_decay"), group.get("lr")]
            counts = str(tensors[name]), get_human_readable_count(elements[name])
            style = "bold red" if name == LOST else None
            table.add_row(Text(name), *counts, *map(_setting, settings), style=style)
    return table


def _setting(value: Any) -> str:
    if value is None:
        return "-"
    return ("yes" if value else "no") if isinstance(value, bool) else f"{float(value):.4g}"
