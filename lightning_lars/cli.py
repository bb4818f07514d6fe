"""LightningCLIs that build their optimizer over parameter groups, from YAML or the command line."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch.cli
import pytorch_lightning.cli
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_lars.advice.advise import advise
from lightning_lars.groups.layer_depth import LayerDepth
from lightning_lars.groups.matrices import Matrices
from lightning_lars.trainer.cli_optimizers import ConfigureOptimizers, warn_of_override

_EitherCLI: Any = object


class _LateOptimizer(_EitherCLI):  # type: ignore[misc]
    """Builds ``--optimizer`` in ``configure_optimizers``, over ``param_groups``.

    The stock CLI builds it as soon as the model exists, over bare ``parameters()``: norms and biases are
    adapted like the rest, and it loses its parameters if a strategy replaces them later.
    """

    def __init__(self, *args: Any, auto_configure_optimizers: bool = True, **kwargs: Any) -> None:
        self._builds_optimizer = auto_configure_optimizers
        super().__init__(*args, auto_configure_optimizers=False, **kwargs)

    def add_core_arguments_to_parser(self, parser: Any) -> None:
        """Add ``--optimizer``, ``--lr_scheduler`` and the options for building both."""
        super().add_core_arguments_to_parser(parser)
        if not self._builds_optimizer:
            return
        parser.add_argument(
            "--lr_scheduler_interval",
            type=Literal["step", "epoch"] | None,
            default=None,
            help="When the scheduler steps (null: each optimizer step for WarmupDecayLR, else each epoch).",
        )
        parser.add_argument(
            "--param_groups.exclude",
            type=list[str],
            default=[],
            help="Patterns over parameter names to exclude in addition to norms, biases and gains.",
        )
        for switch, what in (
            ("exclude_bias", "biases are excluded from adaptation and weight decay."),
            ("exclude_norm", "normalization layers are excluded."),
            ("exclude_gain", "gains are excluded, and parameters broadcast over the batch, such as tokens."),
        ):
            parser.add_argument(f"--param_groups.{switch}", type=bool, default=True, help=f"Whether {what}")
        parser.add_argument(
            "--param_groups.excluded_lr",
            type=float | None,
            default=None,
            help="Learning rate of excluded parameters, independent of --optimizer's (null: the same).",
        )
        parser.add_argument(
            "--param_groups.excluded_lr_scale",
            type=float,
            default=1.0,
            help="The same as a factor on the learning rate of the rest; excludes excluded_lr.",
        )
        parser.add_argument(
            "--param_groups.layer_decay",
            type=float | None,
            default=None,
            help="Factor from the learning rate of a block to that of the block before it, for fine-tuning.",
        )
        parser.add_argument(
            "--param_groups.layer_depth",
            type=LayerDepth | None,
            default=None,
            help="Layers by patterns over names, or a function, where the order of modules is not the depth.",
        )
        parser.add_argument(
            "--param_groups.matrix_optimizer",
            type=Callable[[Iterable[Any]], Optimizer] | None,
            default=None,
            help="Another optimizer, such as Muon, for matrices of hidden layers; --optimizer has the rest.",
        )
        parser.add_argument(
            "--param_groups.matrices",
            type=Matrices | None,
            default=None,
            help="What is a matrix, by patterns over names, or a function, where the rule does not fit.",
        )

    def link_optimizers_and_lr_schedulers(self, parser: Any) -> None:
        """Add ``--optimizer`` and ``--lr_scheduler`` unless ``add_arguments_to_parser`` has done so."""
        if self._builds_optimizer:
            if not parser._optimizers:
                parser.add_optimizer_args((Optimizer,))
            if not parser._lr_schedulers:
                parser.add_lr_scheduler_args()
        super().link_optimizers_and_lr_schedulers(parser)

    # Lightning's subcommands are the methods of its Trainer; only private methods add a function to them.
    def _add_subcommands(self, parser: Any, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        if "advise" in self._subcommand_parsers:
            return  # a method of the user's own Trainer
        description = "Measures, in a short run, what a larger batch size would gain and need."
        advising = self.init_parser(**{**kwargs.get("fit", {}), "description": description})
        self._add_arguments(advising)
        self._subcommand_method_arguments["advise"] = advising.add_function_arguments(
            advise, skip={"model", "train_dataloaders", "datamodule", "trainer"}
        )
        advising.add_argument(
            "--json", type=str | None, default=None, help='File to write JSON to, or "-" to print it instead.'
        )
        self._subcommand_parsers["advise"] = advising
        parser._subcommands_action.add_subcommand("advise", advising, help=description)

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand != "advise" or "advise" in self.subcommands():
            super()._run_subcommand(subcommand)
            return
        path = self._get(self.config_init, "json")
        writes = path not in (None, "-") and self.trainer.is_global_zero
        if writes:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        advice = advise(**self._prepare_subcommand_kwargs(subcommand), trainer=self.trainer)
        if not self.trainer.is_global_zero:
            return
        if path == "-":
            print(advice.to_json())
            return
        advice.print()  # first, so that nothing is lost where the file cannot be written
        if writes:
            Path(path).write_text(f"{advice.to_json()}\n")

    def instantiate_classes(self) -> None:
        """Replace the model's ``configure_optimizers``, which runs after ``configure_model``."""
        super().instantiate_classes()
        if not self._builds_optimizer:
            return
        parser = self._parser(self.subcommand)
        config = self.config_init if self.subcommand is None else self.config_init[self.subcommand]
        optimizer = _class_to_build(parser._optimizers, "optimizer", config)
        lr_scheduler = _class_to_build(parser._lr_schedulers, "lr_scheduler", config)
        if not optimizer:
            if lr_scheduler:
                rank_zero_warn("--lr_scheduler has no effect without --optimizer")
            return
        warn_of_override(self.model, type(self).__name__)
        if not lr_scheduler and config["lr_scheduler_interval"] is not None:
            rank_zero_warn("--lr_scheduler_interval has no effect without --lr_scheduler")
        self.model.configure_optimizers = ConfigureOptimizers(
            self.model, optimizer, lr_scheduler, config["lr_scheduler_interval"], config["param_groups"]
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "configure_optimizers" in vars(cls):
            raise TypeError(
                f"{cls.__name__} must not override configure_optimizers, which takes an optimizer that was "
                "built before configure_model: override that of the module, or pass "
                "auto_configure_optimizers=False"
            )


def _class_to_build(registered: Mapping[str, Any], key: str, config: Mapping[str, Any]) -> Any:
    """Return class path and arguments of the object that Lightning would build itself, or None."""
    classes, link_to = registered.get(key, (None, None))
    chosen = config.get(key)
    if classes is None or link_to != "AUTOMATIC" or not chosen:
        return None
    if isinstance(classes, tuple):
        return chosen
    return {"class_path": f"{classes.__module__}.{classes.__qualname__}", "init_args": chosen.as_dict()}


class LargeBatchCLI(_LateOptimizer, lightning.pytorch.cli.LightningCLI):
    """``LightningCLI`` whose ``--optimizer`` excludes norms and biases from adaptation, under every strategy.

    Takes the arguments of ``LightningCLI`` and, on the command line or in YAML, ``lr_scheduler_interval``
    (``step`` or ``epoch``) and ``param_groups`` (``exclude``, ``exclude_bias``, ``exclude_norm``,
    ``exclude_gain``, ``excluded_lr``, ``excluded_lr_scale``, ``layer_decay``, ``layer_depth``,
    ``matrix_optimizer``, ``matrices``). A :class:`~lightning_lars.WarmupDecayLR` without ``total_steps`` gets
    the steps of the run.

    ``python train.py advise --config config.yaml`` takes the arguments of ``fit`` and those of
    :func:`~lightning_lars.advise`, and prints what a larger batch size would gain and need; ``--json FILE``
    writes it too. ``python -m lightning_lars`` is this CLI for any module: ``--model package.Module``.

    Import this module, or ``lightning_lars``, to use the short names ``LARS``, ``LAMB``, ``WarmupDecayLR``.

    Example:
        >>> from lightning import LightningModule
        >>> from torch import nn
        >>> from lightning_lars.cli import LargeBatchCLI
        >>> class Net(LightningModule):
        ...     def __init__(self, width: int = 2):
        ...         super().__init__()
        ...         self.layer = nn.Linear(4, width)
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> arguments = ["--optimizer=lightning_lars.LARS", "--optimizer.lr=0.5", "--seed_everything=0"]
        >>> cli = LargeBatchCLI(Net, trainer_defaults=quiet, args=arguments, run=False)
        >>> for group in cli.model.configure_optimizers().param_groups:
        ...     print(group["name"], group["lr"], group["param_names"])
        adapted 0.5 ['layer.weight']
        excluded 0.5 ['layer.bias']
    """


class PytorchLightningLargeBatchCLI(_LateOptimizer, pytorch_lightning.cli.LightningCLI):
    """:class:`LargeBatchCLI` for the modules and Trainers of ``pytorch_lightning``."""
