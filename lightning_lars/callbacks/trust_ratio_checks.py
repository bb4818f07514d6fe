"""Checks that there are optimizers and layers for a ``TrustRatioMonitor`` to monitor."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_lars.combined.combined_optimizer import parts_of
from lightning_lars.groups.optimizer_names import kinds
from lightning_lars.trust_ratios.layer_names import adapted_layers, check_patterns
from lightning_lars.trust_ratios.protocols import HasTrustRatios


def observable_optimizers(trainer: Trainer, *, measures_nothing_else: bool) -> list[Any]:
    """Return the optimizers to monitor.

    Args:
        trainer: The Trainer.
        measures_nothing_else: Whether neither updates nor gradient norms are measured beside trust ratios.

    Raises:
        MisconfigurationException: If there are none, or nothing of them is to be measured.
    """
    # Lightning's placeholder for no optimizer has no groups.
    optimizers = [
        each
        for each in parts_of(trainer.optimizers)
        if each.param_groups and isinstance(each, HasTrustRatios | Optimizer)
    ]
    if not optimizers:
        raise MisconfigurationException(
            "TrustRatioMonitor needs a torch.optim optimizer, got "
            f"{kinds(trainer.optimizers) or 'none'}: return one from configure_optimizers or remove the "
            "callback"
        )
    plain = [each for each in optimizers if not isinstance(each, HasTrustRatios)]
    if plain and measures_nothing_else:
        raise MisconfigurationException(
            f"TrustRatioMonitor has nothing to measure of {kinds(plain)}, without trust ratios: leave "
            "update_to_weight or gradient_norm on or remove the callback"
        )
    return optimizers


def check_layers(patterns: Sequence[str], optimizers: Sequence[Any], names: Mapping[Tensor, str]) -> None:
    """Check that there are layers to log, and that every pattern matches one; warn if there are none.

    Args:
        patterns: fnmatch patterns over the names of parameters.
        optimizers: The optimizers to monitor.
        names: Names of the module's parameters.

    Raises:
        ValueError: If a pattern matches no layer, adapted or frozen.
    """
    adapted = [name for optimizer in optimizers for name in adapted_layers(optimizer, names)]
    if not adapted:
        rank_zero_warn(
            f"TrustRatioMonitor has nothing to log: {[type(each).__name__ for each in optimizers]} hold "
            "no adapted layer, because all are excluded or frozen. ParamGroupSummary() prints why"
        )
    # Frozen layers may be unfrozen, and added to an optimizer.
    trained = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    frozen = [name for p, name in names.items() if p not in trained]
    check_patterns(patterns, [*adapted, *frozen])
