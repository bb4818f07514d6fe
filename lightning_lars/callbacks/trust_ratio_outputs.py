"""What a ``TrustRatioMonitor`` leaves when training ends: a table, a plot and a report."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_lars.combined.combined_optimizer import parts_of
from lightning_lars.groups.optimizer_names import kinds
from lightning_lars.groups.parameter_names import names_of
from lightning_lars.run_report.page import save_page
from lightning_lars.run_report.training import groups_of, run_of_training, versions_of
from lightning_lars.trust_ratios.history import TrustRatioHistory
from lightning_lars.trust_ratios.plot import save_picture
from lightning_lars.trust_ratios.table import print_trust_ratios


def write_outputs(
    trainer: Trainer,
    pl_module: LightningModule,
    history: TrustRatioHistory,
    warnings: Sequence[str],
    *,
    table: bool,
    picture: Path | None,
    report: Path | None,
) -> None:
    """Print the table, and save plot and report, on rank 0; what fails is a warning.

    Args:
        trainer: The Trainer, after training.
        pl_module: Its module.
        history: What was logged.
        warnings: The warnings that the monitor gave.
        table: Whether to print the table.
        picture: Where to save the plot; None saves none.
        report: Where to save the report; None saves none.
    """
    if not trainer.is_global_zero or not history.steps:
        return
    if table:
        with _never_failing("print its table"):
            print_trust_ratios(rich.get_console(), history)
    if picture is not None:
        with _never_failing(f"save its plot {picture}"):
            save_picture(history, picture)
            rank_zero_info(f"TrustRatioMonitor saved {picture}.")
    if report is not None:
        with _never_failing(f"save its report {report}"):
            _save_report(trainer, pl_module, history, warnings, report)
            rank_zero_info(f"TrustRatioMonitor saved {report}.")


@contextmanager
def _never_failing(to_do: str) -> Iterator[None]:
    """Warn of any error: training is done, and other callbacks have yet to save it."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"TrustRatioMonitor could not {to_do}: {type(error).__name__}: {error}")


def _save_report(
    trainer: Trainer,
    pl_module: LightningModule,
    history: TrustRatioHistory,
    warnings: Sequence[str],
    path: Path,
) -> None:
    optimizers = [each for each in parts_of(trainer.optimizers) if each.param_groups]
    named = zip(kinds(optimizers), (each.param_groups for each in optimizers), strict=True)
    sizes = {name: p.numel() for p, name in names_of(pl_module).items() if not is_lazy(p)}
    settings = {
        **pl_module.hparams,
        "optimizer steps": trainer.global_step,
        "epoch": trainer.current_epoch,
        **versions_of("lightning-lars", "lightning", "torch"),
    }
    run = run_of_training(
        history.state_dict(),
        history.learning_rates(),
        groups_of(list(named), sizes),
        settings,
        warnings,
    )
    save_page(run, type(pl_module).__name__, path)
