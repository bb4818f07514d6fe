"""Recomputes the running statistics of batch normalization before they are used."""

import sys
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from typing_extensions import override

from lightning_lars.batch_norm import PopulationStatistics, pool
from lightning_lars.rules import POSITIVE_WHOLE
from lightning_lars.trainer.callback import Callback
from lightning_lars.trainer.extra_passes import preserve_training_state, training_batches


@runtime_checkable
class HasPreciseBatchNormForward(Protocol):
    """A LightningModule that defines how a training batch passes through its layers."""

    def precise_batch_norm_forward(self, batch: Any) -> Any:
        """Run the layers on a training batch as ``training_step`` does; the return value is ignored."""
        ...


class PreciseBatchNorm(Callback):
    """Recomputes the running statistics of batch normalization from training batches.

    Running averages lag behind the weights: after 25 steps with ``momentum=0.1`` they still retain 7 % of
    their initial values, and large batches leave few steps. Recomputed, they are the mean and the (unbiased)
    variance of all inputs of the layer in ``num_batches`` batches, at the current weights (Wu and Johnson
    2021, arXiv:2105.07576). ``torch.optim.swa_utils.update_bn`` runs the passes, without gradients. Under
    distributed strategies every rank runs ``num_batches`` batches of its share of the data, and all end up
    with the statistics of all inputs.

    This happens before each validation of a fit, at the end of each epoch if the Trainer does not validate,
    and at the end of training if there was a step since. ``ModelCheckpoint`` saves after each of these, so
    checkpoints hold the validated statistics; with ``every_n_train_steps`` they hold running averages. The
    sanity check, which runs before training, and ``trainer.validate`` and ``trainer.test``, which have no
    training batches, do not change the statistics.

    Training continues with the recomputed statistics, which it does not read. Everything else is preserved:
    weights, gradients, other buffers (and ``num_batches_tracked``), modes, random states, and the train
    loader, because a copy is iterated. A data set with its own random state is only unaffected in worker
    processes. Other layers are in eval mode, as when the statistics are used: dropout is off. Layers in eval
    mode during training, or with ``track_running_stats=False``, are skipped.

    A batch, or its first element if it is a list or tuple, is passed to ``forward`` of the LightningModule.
    If training passes something else, define ``precise_batch_norm_forward(self, batch)`` there. After
    ``WeightAveraging`` in the list of callbacks, the statistics belong to the averaged weights.

    Args:
        num_batches: Batches on each rank, at least 1. 32 batches of 256 are 8192 samples, from which a mean
            is known to 1 % of a standard deviation.

    Raises:
        MisconfigurationException: If the training data cannot be iterated without disturbing training; at the
            start of training, if the module has neither ``forward`` nor ``precise_batch_norm_forward``.

    Example:
        >>> import lightning
        >>> from lightning_lars import PreciseBatchNorm
        >>> trainer = lightning.Trainer(callbacks=[PreciseBatchNorm(num_batches=16)], accelerator="cpu")
    """

    def __init__(self, num_batches: int = 32) -> None:
        self.num_batches = POSITIVE_WHOLE.checked_int("num_batches", num_batches)
        self._batch_norms: dict[str, _BatchNorm] = {}
        self._trained: dict[str, _BatchNorm] = {}
        self._recomputed_at: int | None = None
        self._warned = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._reset()
        if stage == "fit":
            self._recomputed_at = None
        elif self._recomputed_at is None:
            rank_zero_info(
                f"PreciseBatchNorm recomputes nothing in trainer.{getattr(stage, 'value', stage)}, which has "
                "no training batches. A model that was trained or saved by a fit with it is up to date; for "
                "another model, call torch.optim.swa_utils.update_bn first."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = pl_module.named_modules()
        self._batch_norms = {name: layer for name, layer in layers if isinstance(layer, _BatchNorm)}
        self._remember_trained()
        # Not only when an epoch has been trained.
        if self._trained and not _is_defined(pl_module):
            raise MisconfigurationException(
                f"PreciseBatchNorm passes training batches to forward, which {type(pl_module).__name__} does "
                "not define: define it, or precise_batch_norm_forward(self, batch), which runs the layers as "
                "training_step does, or remove the callback"
            )
        if not self._trained:
            rank_zero_warn(
                f"PreciseBatchNorm found no statistics to recompute in {type(pl_module).__name__}: none of "
                f"its {len(self._batch_norms)} batch normalization layers is in train mode with "
                "track_running_stats=True. Remove the callback, unless one will be"
            )

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Not in validation, where all layers are in eval mode, not only frozen ones.
        self._remember_trained()

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Does nothing in a sanity check or an evaluation: before training, no layers are known.
        self._recompute(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            self._recompute(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recompute(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._reset()

    def _reset(self) -> None:
        self._batch_norms = {}
        self._trained = {}

    def _remember_trained(self) -> None:
        self._trained = {
            name: layer
            for name, layer in self._batch_norms.items()
            if layer.training and layer.track_running_stats
        }

    def _recompute(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._trained or self._recomputed_at == trainer.global_step:
            return
        layers = self._trained.values()
        statistics = [PopulationStatistics(layer) for layer in layers]
        # Code that is already compiled does not call hooks; there is none if the compiler is not loaded.
        compiled = "torch._dynamo" in sys.modules
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            batches = training_batches(trainer, pl_module, self.num_batches, "PreciseBatchNorm")
            with preserve_training_state(trainer, pl_module, layers), closing(batches):
                hooks = [hook for each in statistics for hook in each.watch()]
                try:
                    # update_bn, which disables gradients, passes on the first element of a tuple.
                    update_bn(((batch,) for batch in batches), _Passes(layers, _forward(trainer, pl_module)))
                finally:
                    for hook in hooks:
                        hook.remove()
        pool(statistics, _all_reduce(trainer))
        self._recomputed_at = trainer.global_step
        unreached = [name for name, each in zip(self._trained, statistics, strict=True) if not each.count]
        if unreached and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"PreciseBatchNorm did not recompute the running statistics of {unreached}, which forward of "
                f"{type(pl_module).__name__} does not reach: to recompute them too, define "
                "precise_batch_norm_forward(self, batch) there, which runs the layers as training_step does"
            )


class _Passes(nn.Module):
    """The model for update_bn: the layers to recompute, and a forward pass that reaches them."""

    def __init__(self, layers: Iterable[nn.Module], run: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.run = run

    @override
    def forward(self, batch: Any) -> None:
        self.run(batch)


def _is_defined(pl_module: LightningModule) -> bool:
    """Return whether the module has a forward pass of its own, or one for this callback."""
    # By name, because lightning.pytorch and pytorch_lightning each define a LightningModule.
    inherited = getattr(pl_module.forward, "__qualname__", "") == "LightningModule.forward"
    return isinstance(pl_module, HasPreciseBatchNormForward) or not inherited


def _forward(trainer: Trainer, pl_module: LightningModule) -> Callable[[Any], None]:
    # The root of FSDP1 holds parameters that are unsharded only within its own forward pass.
    root = trainer.model if isinstance(trainer.model, FullyShardedDataParallel) else pl_module
    own = "precise_batch_norm_forward"
    defined = isinstance(pl_module, HasPreciseBatchNormForward)
    run: Callable[[Any], Any] = getattr(pl_module, own) if defined else root.__call__
    if defined and root is not pl_module:
        # Lightning's way to call a method through a wrapper has no public name.
        run = partial(trainer.strategy._forward_redirection, root, pl_module, own)

    def forward(batch: Any) -> None:
        inputs = batch[0] if isinstance(batch, list | tuple) and not defined else batch
        try:
            with trainer.precision_plugin.forward_context():
                run(inputs)
        except Exception as error:
            if not defined:
                error.add_note(
                    f"PreciseBatchNorm passed {type(inputs).__name__} from a training batch "
                    f"({type(batch).__name__}) to forward of {type(pl_module).__name__}. If it takes "
                    f"something else, define {own}(self, batch) there, which runs the layers as "
                    "training_step does"
                )
            raise

    return forward


def _all_reduce(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    """Return a function that sums a tensor over the data-parallel ranks."""
    mesh: Any = getattr(trainer.strategy, "device_mesh", None)
    # Ranks that share their batches (tensor parallelism) may hold different channels of a layer.
    shared = mesh is not None and "data_parallel" in (mesh.mesh_dim_names or ())
    group = mesh["data_parallel"].get_group() if shared else None
    return lambda values: cast(Tensor, trainer.strategy.reduce(values, group=group, reduce_op="sum"))
