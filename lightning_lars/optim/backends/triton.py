"""Any algorithm on a GPU: one launch over all layers of a batch before their norms, and one after."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import FunctionType
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lars.optim.algorithm import Factors
from lightning_lars.optim.backends.eager import Eager
from lightning_lars.optim.backends.triton_table import CHUNK, LayerTable
from lightning_lars.optim.backends.triton_walk import BLOCK, gather, norms, root, walk
from lightning_lars.sharding.norms import accumulation_dtype

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_CHUNKS_AT_ONCE = 256


class Triton(Eager):
    """The step of one batch by :func:`~lightning_lars.optim.backends.triton_walk.walk`.

    The launch that measures keeps a direction that the ratio scales, in memory of the size of the batch: to
    apply it moves less than to compute it again.
    """

    holds_moments: ClassVar[bool] = True

    def measure(self) -> tuple[Tensor, Tensor] | None:
        """Return the norms of what of the layers is here, and of what it is measured against, in float32.

        Each of shape ``(layers,)``; None where nothing is adapted. Where the batch adapts its direction, its
        moments advance.
        """
        batch = self.batch
        if not isinstance(self.lr, Tensor):
            self.lr = torch.full((), self.lr, dtype=torch.float32, device=batch.weights[0].device)
        moments = self.state.moments()
        self.absent = moments.count(None)
        held = [moment for moment in moments if moment is not None]
        self.moments = len(held)
        steps = [self.state.next_steps()] if self.algorithm.counts_steps else []
        self.table = table = self.tables.table((batch.weights, batch.grads, *held, *steps))
        if steps:
            self.t = self._gathered(2 + self.moments).to(accumulation_dtype(batch.weights[0]))
        if not batch.group["layer_adaptation"]:
            return None
        if batch.adapts_direction:
            self.stored_direction = torch.empty(table.chunked.room, dtype=torch.float32, device=table.device)
        sums = torch.empty(2, table.chunks, dtype=torch.float64, device=table.device)
        self._launch("measure", 1.0, sums)
        return norms_of_layers(sums, table)

    def move(self, ratio: Any) -> None:
        """Move the weights, and what :meth:`measure` has not moved, by the trust ratios, 1 for None."""
        self._launch(
            "move" if self.stored_direction is None else "apply", 1.0 if ratio is None else ratio, None
        )

    def _gathered(self, column: int) -> Tensor:
        """Return numbers that each layer has in a tensor of its own, shape ``(layers,)``."""
        layers = self.table.layers
        numbers = torch.empty(layers, dtype=torch.float32, device=self.table.device)
        with device_of(self.table):
            gather[(triton.cdiv(layers, BLOCK),)](self.table.columns, column, numbers, layers, block=BLOCK)
        return numbers

    def _launch(self, does: str, ratio: Any, sums: Tensor | None) -> None:
        table, group = self.table, self.batch.group
        if not table.chunks:
            return
        factors = self._factors(ratio)
        unused = self.lr
        with device_of(table):
            walk[(table.chunks,)](
                table.columns,
                table.chunked.sizes,
                table.chunked.layer_of_chunk,
                table.chunked.offset_of_chunk,
                table.chunked.places,
                unused if self.stored_direction is None else self.stored_direction,
                unused if sums is None else sums,
                numbers(factors),
                kinds(factors),
                self.lr,
                float(group["weight_decay"]),
                unused if self.gradient_scale is None else self.gradient_scale,
                table.layers,
                table.chunks,
                arguments(self.h),
                direction=compiled(self.algorithm.direction),
                measured=None if self.batch.adapts_direction else compiled(self.algorithm.denominator_vector),
                numbers=len(factors) - 1,
                moments=self.moments,
                absent=self.absent,
                dtype=DTYPES[self.batch.weights[0].dtype],
                does=does,
                decays=self.h.weight_decay != 0,
                has_scale=self.gradient_scale is not None,
                chunk_size=CHUNK,
                block=BLOCK,
            )


def norms_of_layers(sums: Tensor, table: LayerTable) -> tuple[Tensor, Tensor]:
    """Return the norms of weights and direction.

    Args:
        sums: Of squares over each chunk, shape ``(2, chunks)``, float64.
        table: Which chunks a layer has.

    Returns:
        Two tensors of shape ``(layers,)``, float32.
    """
    of_layers = torch.zeros(2, table.layers, dtype=torch.float32, device=table.device)
    if table.chunks:
        with device_of(table):
            norms[(table.layers, 2)](
                sums,
                of_layers,
                table.chunked.first_chunk,
                table.layers,
                table.chunks,
                rounds=triton.cdiv(table.chunked.most_chunks, _CHUNKS_AT_ONCE),
                chunks_at_once=_CHUNKS_AT_ONCE,
            )
    return of_layers[0], of_layers[1]


def device_of(table: LayerTable) -> AbstractContextManager[object]:
    """Make the device of the layers the current one, to which Triton launches."""
    device = table.device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def compiled(equation: Callable[..., Any]) -> Any:
    """Return an equation of an algorithm, in which ``sqrt`` is torch's, for a block of elements on a GPU."""
    # Triton looks up annotations too, which are all Any.
    names = {name: tl.float32 if value is Any else value for name, value in equation.__globals__.items()}
    names |= {"tl": tl, "sqrt": root}
    return triton.jit(FunctionType(equation.__code__, names, equation.__name__))


def arguments(h: Any) -> Any:
    """Return hyperparameters for a kernel: numbers, which a schedule may move, and what chooses its code."""
    return type(h)(*map(_argument, h))


def _argument(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_argument, value))
    return tl.constexpr(value) if value is None or isinstance(value, bool | str) else float(value)


def numbers(factors: Factors) -> tuple[Any, ...]:
    """Return what multiplies directions and enters them, as a kernel takes it."""
    return tuple(factor if isinstance(factor, Tensor) else float(factor) for factor in factors)


def kinds(factors: Factors) -> tuple[Any, ...]:
    """Return of each factor whether it is a number, or a tensor for all layers, or with one for each."""
    return tuple(
        tl.constexpr("number" if not isinstance(factor, Tensor) else "each" if factor.ndim else "all")
        for factor in factors
    )
