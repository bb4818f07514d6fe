"""Clips gradients at a percentile of recent gradient norms."""

from functools import partial
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lars.class_names import has_class_named
from lightning_lars.gradients.before_steps import BeforeSteps
from lightning_lars.gradients.norms import gradient_norms, scale_gradients
from lightning_lars.gradients.percentile_clipping import PercentileClipping
from lightning_lars.groups.optimizer_names import by_name
from lightning_lars.optim.parameters import named_params
from lightning_lars.optim.state.checkpoint import is_checkpoint_dry_run
from lightning_lars.rules import FLAG, as_int, counted, is_number, is_whole, require
from lightning_lars.sharding.shards import Shard, find_shards
from lightning_lars.trainer.callback import Callback
from lightning_lars.trainer.logging import is_logging, log, publish


class PercentileGradientClipping(Callback):
    """AutoClip: clips the gradient at a percentile of its norms in the last steps.

    ::

        history = the last norms of the gradient, before clipping, this step's included
        gradient = min(1, percentile(history) / norm) * gradient

    Seetharaman et al. 2020, arXiv:2007.14469, where the history covers the whole run. bitsandbytes had it as
    ``percentile_clipping``, over 100 steps and per tensor: ``docs/compatibility.md`` lists the equivalent
    arguments.

    Each optimizer has a separate history, over its parameters; with ``per_layer=True``, each parameter has
    one. Norms are of whole gradients: accumulated over micro-batches, averaged across ranks, unscaled. Norms
    of 0, and those of a step with a non-finite gradient, which a gradient scaler skips, do not enter the
    history. The history is part of checkpoints.

    Other callbacks see gradients before clipping, the module's ``on_before_optimizer_step`` after it. Steps
    that bypass Lightning (``optimizers(use_pl_optimizer=False)``, ``optimizer.optimizer.step()``) are clipped
    too, but do not call these hooks. When training ends, a warning names optimizers whose steps could never
    be observed. Values are copied to the host only when Lightning logs.

    Args:
        percentile: Percentile of the history to clip at, at least 0 and below 100: with 10, nine out of ten
            steps are clipped if norms stay at the same level.
        history: Number of norms to keep, at least 2.
        per_layer: Whether to clip each layer by its own norms.
        starts_full: Whether the first norm fills the history, as in bitsandbytes; by default the percentile
            is taken over the norms so far.

    ===================================  ==============================================================
    Key                                  Value
    ===================================  ==============================================================
    ``gradient_clipping/norm``           Norm before clipping, in the step that is logged
    ``gradient_clipping/threshold``      Norm that it was clipped to
    ``gradient_clipping/share_clipped``  Fraction of steps since the last log that were clipped, from 0 to 1
    ===================================  ==============================================================

    With ``per_layer=True``, the first two are medians over layers, and the fraction is over layers and steps.
    With several optimizers (manual optimization) keys are ``gradient_clipping/OPTIMIZER/...``, numbered as in
    ``LearningRateMonitor``. All are also in ``trainer.callback_metrics``, from the first log on.

    Raises:
        ValueError: If an argument breaks its rule.
        MisconfigurationException: At the start of a fit, under DeepSpeed, which clips by itself, without an
            optimizer, or if a checkpoint has a history for a different number of layers.

    Example:
        >>> import lightning
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_lars import PercentileGradientClipping
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> quiet |= dict(enable_model_summary=False, accelerator="cpu", devices=1, log_every_n_steps=1)
        >>> trainer = lightning.Trainer(max_steps=16, callbacks=[PercentileGradientClipping(50.0)], **quiet)
        >>> trainer.fit(BoringModel())
        >>> sorted(key for key in trainer.callback_metrics if key.startswith("gradient_clipping"))
        ['gradient_clipping/norm', 'gradient_clipping/share_clipped', 'gradient_clipping/threshold']
    """

    def __init__(
        self,
        percentile: float = 10.0,
        history: int = 100,
        per_layer: bool = False,
        starts_full: bool = False,
    ) -> None:
        holds = is_number(percentile) and 0 <= percentile < 100
        require("percentile", "at least 0 and below 100, where it would clip nothing", percentile, holds)
        require("history", "an integer above 1", history, is_whole(history) and history > 1)
        FLAG.check("per_layer", per_layer)
        FLAG.check("starts_full", starts_full)
        self.percentile = percentile
        self.history = as_int(history)
        self.per_layer = per_layer
        self.starts_full = starts_full
        self._clippings: list[PercentileClipping] = []
        self._states: list[Tensor] = []
        # For each optimizer, in the order of the columns.
        self._params: list[list[Tensor]] = []
        self._shards: list[dict[Tensor, Shard]] = []
        self._steps: list[BeforeSteps] = []
        self._has_stepped = self._has_trained = False

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(per_layer=self.per_layer)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # Resuming from a checkpoint fills them before training starts.
        self._clippings, self._states = [], []
        if has_class_named(trainer.strategy, "DeepSpeedStrategy"):
            raise MisconfigurationException(
                "PercentileGradientClipping cannot clip under DeepSpeed, which partitions the gradients "
                "itself: use Trainer(gradient_clip_val=...), which DeepSpeed follows, or strategy='ddp', "
                "'fsdp' or ModelParallelStrategy"
            )
        if trainer.gradient_clip_val:
            self._warn_of_double_clipping(f"Trainer(gradient_clip_val={trainer.gradient_clip_val!r})")
        _move_behind_others(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(optimizer.param_groups for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                "PercentileGradientClipping clips the gradients that an optimizer steps with, got no "
                "optimizer: return one from configure_optimizers or remove the callback"
            )
        number = len(trainer.optimizers)
        self._has_stepped = self._has_trained = False
        self._params, self._shards = [[] for _ in range(number)], [{} for _ in range(number)]
        self._clippings = [
            PercentileClipping(self.percentile, self.history, self.starts_full) for _ in range(number)
        ]
        states, self._states = self._states, []
        if states and len(states) != number:
            raise MisconfigurationException(
                f"the checkpoint has the gradient norms of {counted(len(states), 'optimizer')} for "
                f"PercentileGradientClipping, the module has {number}: resume the module that wrote it"
            )
        for clipping, state, optimizer in zip(self._clippings, states, trainer.optimizers, strict=False):
            count = sum(len(group["params"]) for group in optimizer.param_groups)
            if self.per_layer and state.shape[1] > count:
                raise MisconfigurationException(
                    f"the checkpoint has the gradient norms of {counted(state.shape[1], 'layer')} for "
                    f"PercentileGradientClipping, the optimizer has {count}: resume the module that wrote it"
                )
            clipping.load(state)
        for optimizer in trainer.optimizers:
            max_grad_norm = optimizer.param_groups[0].get("max_grad_norm")
            if max_grad_norm is not None:
                self._warn_of_double_clipping(f"{type(optimizer).__name__}(max_grad_norm={max_grad_norm!r})")
        self._detach()
        self._steps = [
            BeforeSteps(optimizer, partial(self._clip, trainer, i))
            for i, optimizer in enumerate(trainer.optimizers)
        ]

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._steps[next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)].announce()

    @torch.no_grad()
    def _clip(self, trainer: Trainer, index: int) -> None:
        if is_checkpoint_dry_run():
            return
        optimizer = trainer.optimizers[index]
        params, shards = self._update_params(index, optimizer)
        norms = gradient_norms(params, shards, trainer.strategy.root_device)
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            # Lightning has not unscaled p.grad, because torch's fused optimizers do so in their step.
            norms = norms / scaler.scale(torch.ones_like(norms))
        if not self.per_layer:
            norms = torch.linalg.vector_norm(norms)[None]
        scale_gradients(params, self._clippings[index].scales(norms))
        self._has_stepped = True

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Lightning logs on every batch that is accumulated for a step; the step is in the last one.
        stepped, self._has_stepped = self._has_stepped, False
        self._has_trained = True
        for steps in self._steps:
            steps.reset()
        if not stepped or not is_logging(trainer):
            return
        metrics = {}
        for name, clipping in zip(by_name(trainer.optimizers), self._clippings, strict=True):
            clipped = clipping.read()
            if clipped is not None:
                metrics.update({f"gradient_clipping/{name}{k}": v for k, v in clipped._asdict().items()})
        log(trainer, metrics)
        publish(trainer, metrics)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        unseen = [name for name, steps in zip(names, self._steps, strict=True) if not steps.number]
        if unseen and self._has_trained and not cast(Any, trainer).fast_dev_run:
            rank_zero_warn(
                f"PercentileGradientClipping has clipped no gradient of {', '.join(unseen)}, which took no "
                "step that it could observe. It observes step() of the optimizer that configure_optimizers "
                "returned, not that of an optimizer inside it, nor other methods: step through the former, "
                "or remove the callback"
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()
        # Move the state to the host, where it stays available for a checkpoint.
        self._states = [clipping.state() for clipping in self._clippings]
        self._clippings, self._params, self._shards = [], [], []

    @override
    def state_dict(self) -> dict[str, Any]:
        states = [clipping.state() for clipping in self._clippings] or self._states
        return {"norms": states} if states else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._states = state_dict["norms"]

    def _detach(self) -> None:
        for steps in self._steps:
            steps.detach()
        self._steps = []

    def _update_params(self, index: int, optimizer: Optimizer) -> tuple[list[Tensor], dict[Tensor, Shard]]:
        """Return the parameters in the order of their columns, new ones last, and their shards."""
        params, shards = self._params[index], self._shards[index]
        if len(params) != sum(len(group["params"]) for group in optimizer.param_groups):
            named = named_params(optimizer.param_groups)
            known = set(params)
            params += [p for _, p in named if p not in known]
            shards.update(find_shards(named))
        return params, shards

    def _warn_of_double_clipping(self, clipping: str) -> None:
        rank_zero_warn(
            f"gradients are clipped twice: by PercentileGradientClipping(percentile={self.percentile!r}) and "
            f"then by {clipping}. Use only one of them"
        )


def _move_behind_others(trainer: Trainer, clipping: Callback) -> None:
    """Move the callback behind those that see unclipped gradients, but before those that save checkpoints."""
    callbacks = cast(Any, trainer).callbacks
    saves = [has_class_named(each, "Checkpoint") for each in callbacks]
    others = [each for each, last in zip(callbacks, saves, strict=True) if each is not clipping and not last]
    last = [each for each, last in zip(callbacks, saves, strict=True) if last]
    # A new list: Lightning is iterating over the old one while it calls `setup`.
    cast(Any, trainer).callbacks = [*others, clipping, *last]
