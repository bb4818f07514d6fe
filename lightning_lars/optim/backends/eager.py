"""The back end that runs any algorithm on any device, by torch's foreach operations."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lars.optim.algorithm import Algorithm, Hyperparameters
from lightning_lars.optim.backends.scratch import Scratch
from lightning_lars.optim.backends.tensor_list import TensorList, per_layer_scalars
from lightning_lars.optim.backends.triton_table import LayerTables
from lightning_lars.optim.batches import Batch
from lightning_lars.optim.state.plain import BatchState
from lightning_lars.optim.trust_ratio import TrustRatios
from lightning_lars.sharding.norms import accumulation_dtype, layer_norms


class Eager:
    """The step of one batch: first :meth:`measure`, then :meth:`move`.

    Args:
        algorithm: The algorithm whose equations are evaluated.
        batch: The layers.
        state: The state of the layers, which is unpacked during :meth:`measure` if the batch adapts its
            direction, otherwise during :meth:`move`.
        scratch: Memory that the batches use one after the other.
        tables: The address tables of this step.
    """

    holds_moments: ClassVar[bool] = False
    """Whether the moments must stay unpacked from :meth:`measure` to :meth:`move`."""

    in_floats: ClassVar[bool] = False
    """Whether :meth:`move` takes the trust ratios as a list of floats, not as a tensor."""

    can_repeat: ClassVar[bool] = False
    """Whether :meth:`begin` can start another step of the same layers."""

    def __init__(
        self,
        algorithm: type[Algorithm],
        batch: Batch,
        state: BatchState,
        scratch: Scratch,
        tables: LayerTables,
    ) -> None:
        self.algorithm, self.state = algorithm, state
        self.scratch, self.tables = scratch, tables
        self.begin(batch)

    def begin(self, batch: Batch) -> None:
        """Begin a step, with these gradients, hyperparameters and learning rate."""
        self.batch, self.h = batch, batch.h
        device, dtype = batch.weights[0].device, dtype_of_step(batch.weights[0])
        self.dtype = dtype
        self.lr = batch.group["lr"]
        if isinstance(self.lr, Tensor):
            self.lr = self.lr.to(device, dtype, non_blocking=True).reshape(())
        self.gradient_scale: Tensor | None = None
        self.t: Tensor | None = None
        self.stored_direction: Any = None

    def gradient_norms(self) -> Tensor:
        """Return the norm of the gradient of each layer, or of its local shard, shape ``(layers,)``."""
        return layer_norms(self.batch.grads)

    def scale_gradients(self, scale: Tensor) -> None:
        """Multiply all gradients by this 0-d tensor in this step, after :meth:`begin`."""
        self.gradient_scale = scale.to(self.batch.weights[0].device, self.dtype, non_blocking=True)

    def find_gradients(self, addresses: Sequence[int]) -> None:
        """Use the gradients at these addresses in the next step, if the back end can repeat a step."""

    def end(self) -> None:
        """Release gradients and scratch memory until the next step, if the back end can repeat a step."""

    @staticmethod
    def why_not(algorithm: type[Algorithm], h: Hyperparameters) -> str | None:
        """Return which hyperparameters are not supported, None if all are."""
        return None

    def measure(self) -> tuple[Tensor, Tensor] | TrustRatios[Tensor] | None:
        """Return the norms ``|w|`` and ``|d|`` of the local shards, or None for layers that are not adapted.

        Each has shape ``(layers,)``. A back end that computes the trust ratios itself returns them instead.
        This updates the moments if the batch adapts its direction.
        """
        self._read()
        if not self.batch.group["layer_adaptation"]:
            return None
        if self.batch.adapts_direction:
            d = self.stored_direction = self._direction_in_advance()
        else:
            d = self.algorithm.denominator_vector(self._decayed_weights(), TensorList(self.g), self.h)
        norms = layer_norms([*self.w, *d.value()])
        return norms[: len(self.w)], norms[len(self.w) :]

    def move(self, ratio: Any) -> None:
        """Update the weights, and the moments unless :meth:`measure` has.

        Args:
            ratio: The trust ratios, shape ``(layers,)``; None for 1.
        """
        ratio = 1.0 if ratio is None else ratio
        if self.stored_direction is None:
            rate, d = self._direction(ratio)
        else:
            rate, d = per_layer_scalars(self._factors(ratio)[0]), self.stored_direction
        _ = TensorList(self.w, use="advance") - d * rate
        self._write()

    def _read(self) -> None:
        """Set ``w`` and ``g`` in float32 or wider, with all options applied that precede the equations."""
        batch = self.batch
        self.w, self.g = in_dtype(batch.weights, self.dtype), in_dtype(batch.grads, self.dtype)
        if self.h.maximize:
            self.g = list(torch._foreach_neg(self.g))
        if self.gradient_scale is not None:
            self.g = list(torch._foreach_mul(self.g, self.gradient_scale))
        if self.h.decoupled_weight_decay:
            torch._foreach_mul_(self.w, 1 - self.lr * batch.group["weight_decay"])

    def _write(self) -> None:
        if self.w[0].dtype != self.batch.weights[0].dtype:
            torch._foreach_copy_(self.batch.weights, self.w)

    def _decayed_weights(self) -> Any:
        return TensorList(self.w) if self.h.weight_decay else 0.0

    def _direction_in_advance(self) -> TensorList:
        _, d = self._direction(1.0)
        return d.whole()

    def _direction(self, ratio: Any) -> tuple[Any, TensorList]:
        """Return the rate and the direction, and update the moments."""
        moments = self.state.moments()
        self._count_step()
        rate, *factors = map(per_layer_scalars, self._factors(ratio))
        before = [0.0 if moment is None else TensorList(moment, use="advance") for moment in moments]
        d, *after = self.algorithm.direction(
            self._decayed_weights(), TensorList(self.g), *before, *factors, self.h
        )
        for old, new in zip(moments, after, strict=True):
            if old is not None and new.value() is not old:
                torch._foreach_copy_(old, new.value())
        return rate, d

    def _count_step(self) -> None:
        if self.algorithm.counts_steps:
            self.t = torch.stack(self.state.next_steps()).to(accumulation_dtype(self.batch.weights[0]))

    def _factors(self, ratio: Any) -> tuple[Any, ...]:
        return self.algorithm.factors(ratio, self.lr, self.batch.is_first, self.t, self.h)


def dtype_of_step(p: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic, which is float32 for weights stored in half precision."""
    return p.dtype if p.dtype is torch.float32 else torch.promote_types(p.dtype, torch.float32)


def in_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the tensors cast to a dtype, without a copy where they have it."""
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]
