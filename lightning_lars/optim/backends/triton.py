"""The back end that runs any algorithm on a GPU, with one launch before the norms and one after."""

from collections import namedtuple
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lars.optim.backends import triton_ratio
from lightning_lars.optim.backends.eager import Eager
from lightning_lars.optim.backends.triton_clip import norms_of_gradients
from lightning_lars.optim.backends.triton_factors import factors_in_kernel
from lightning_lars.optim.backends.triton_launch import Launches
from lightning_lars.optim.backends.triton_ratio import adapt, trust_ratios
from lightning_lars.optim.backends.triton_scalars import count, root
from lightning_lars.optim.backends.triton_table import CHUNK, LayerTable
from lightning_lars.optim.backends.triton_walk import BLOCK, WARPS, walk
from lightning_lars.optim.batches import Batch
from lightning_lars.optim.state.code_table import CodeTable
from lightning_lars.optim.trust_ratio import Number, TrustRatios, bounds

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_CHUNKS_AT_ONCE = 256


class Triton(Eager):
    """The step of one batch, as launches of :func:`~lightning_lars.optim.backends.triton_walk.walk`.

    Where the trust ratio scales the direction, the first launch stores the direction in scratch memory. The
    second then reads and writes fewer bytes than if it computed the direction again.
    """

    holds_moments: ClassVar[bool] = True
    can_repeat: ClassVar[bool] = True

    def __init__(self, *args: Any) -> None:
        self.launches = Launches()
        self._table: LayerTable | None = None
        self._table_of_gradients: LayerTable | None = None
        self._arguments: dict[tuple[str, bool], _Arguments] = {}
        super().__init__(*args)

    def begin(self, batch: Batch) -> None:
        """Begin a step, with these gradients, hyperparameters and learning rate."""
        if self._arguments and batch.h != self.h:
            self._arguments.clear()
        super().begin(batch)
        if not isinstance(self.lr, Tensor):
            # Triton compiles an int into the kernel, and later rates would have no effect.
            self.lr = float(self.lr)

    def find_gradients(self, addresses: Sequence[int]) -> None:
        """Use the gradients at these addresses in the next step."""
        self._table = self.table.with_gradients(addresses)
        if self._table_of_gradients is not None:
            self._table_of_gradients = self._table_of_gradients.with_gradients(addresses)

    def gradient_norms(self) -> Tensor:
        """Return the norm of the gradient of each layer, or of its local shard, shape ``(layers,)``."""
        table = self._table_of_gradients
        if table is None:
            # Without the state, which may not be in its final tensors yet.
            table = self._table_of_gradients = self.tables.table((self.batch.weights, self.batch.grads))
        with device_of(table):
            return norms_of_gradients(
                self.launches,
                table,
                DTYPES[self.batch.weights[0].dtype],
                CHUNK,
                BLOCK,
                WARPS,
                _CHUNKS_AT_ONCE,
            )

    def end(self) -> None:
        """Release gradients and scratch memory until the next step."""
        self.batch = self.batch._replace(grads=[], states=[])
        self.stored_direction = self.gradient_scale = None
        vars(self).pop("state", None)  # the table holds the addresses

    @property
    def table(self) -> LayerTable:
        """The addresses of the tensors of the batch."""
        if self._table is None:
            columns = self.state.columns()
            self.moments = len(self.algorithm.used_moments(self.h))
            self.steps_in = 2 + len(columns)
            steps = [self.state.steps()] if self.algorithm.counts_steps else []
            self.code_tables = tuple(map(table_argument, self.state.code_tables()))
            self._table = self.tables.table((self.batch.weights, self.batch.grads, *columns, *steps))
        return self._table

    def measure(self) -> tuple[Tensor, Tensor] | TrustRatios[Tensor] | None:
        """Return the norms ``|w|`` and ``|d|`` of the local shards, or None for layers that are not adapted.

        Each has shape ``(layers,)``, in float32. Unsharded layers get their trust ratios instead, except with
        an algorithm that averages norms over steps. This updates the moments if the batch adapts its
        direction, unless they are in 8 bits.
        """
        table = self.table
        if not self.batch.group["layer_adaptation"]:
            return None
        if self.batch.adapts_direction and not self.batch.in_eight_bit:
            self.stored_direction = torch.empty(table.chunked.room, dtype=torch.float32, device=table.device)
        sums = torch.empty(2, max(table.chunks, 1), dtype=torch.float64, device=table.device)
        with device_of(table):
            self._walk("measure", sums, None)
            return self._adapt(sums)

    def move(self, ratio: Any) -> None:
        """Update the weights, and the moments unless :meth:`measure` has; a ratio of None is 1."""
        table = self.table
        with device_of(table):
            self._walk("move" if self.stored_direction is None else "apply", None, ratio)
            self.stored_direction = None  # memory for the next batch
            if self.algorithm.counts_steps and not self._counts_before:
                self.launches(count, "count", table.layers, table.columns, self.steps_in, table.layers)

    @property
    def _counts_before(self) -> bool:
        """Whether ``adapt`` increments the step, because :meth:`move` does not read it."""
        return self.batch.group["layer_adaptation"] and not self.batch.in_eight_bit

    def _walk(self, mode: str, sums: Tensor | None, ratio: Tensor | None) -> None:
        table, chunked, batch = self.table, self.table.chunked, self.batch
        if not table.chunks:
            return
        has_lr_tensor = isinstance(self.lr, Tensor)
        of_rules = self._arguments_of(mode, ratio is not None)
        self.launches(
            walk,
            (mode, has_lr_tensor, ratio is not None),
            table.chunks,
            table.columns,
            chunked.sizes,
            chunked.layer_of_chunk,
            chunked.offset_of_chunk,
            chunked.direction_offsets,
            self.stored_direction,
            sums,
            ratio,
            of_rules.numbers,
            of_rules.kinds,
            self.lr,
            float(batch.group["weight_decay"]),
            self.gradient_scale,
            table.layers,
            table.chunks,
            of_rules.h,
            self.code_tables,
            has_lr_tensor,
            0 if mode == "apply" else len(of_rules.numbers) - 1,
            compiled(self.algorithm.direction),
            None if batch.adapts_direction else compiled(self.algorithm.denominator_vector),
            self.moments,
            len(self.algorithm.moments) - self.moments,
            batch.in_eight_bit,
            self.algorithm.counts_steps and mode != "apply",
            DTYPES[batch.weights[0].dtype],
            mode,
            self.h.weight_decay != 0,
            self.gradient_scale is not None,
            CHUNK,
            CHUNK if batch.in_eight_bit else BLOCK,
            warps=WARPS,
        )

    def _adapt(self, sums: Tensor) -> tuple[Tensor, Tensor] | TrustRatios[Tensor]:
        table, algorithm = self.table, self.algorithm
        is_whole = not self.batch.is_sharded and algorithm.norm_moment is None
        rows = len(TrustRatios._fields) if is_whole else 2
        of_layers = torch.empty(rows, table.layers, dtype=torch.float32, device=table.device)
        has_lr_tensor = isinstance(self.lr, Tensor)
        self.launches(
            adapt,
            ("adapt", has_lr_tensor),
            table.layers,
            table.columns,
            table.chunked.first_chunk,
            sums,
            of_layers,
            self.lr,
            table.layers,
            sums.shape[1],
            self._arguments_of("adapt", False).h,
            has_lr_tensor,
            compiled(algorithm.ratio) if is_whole else None,
            self.steps_in if algorithm.counts_steps and self._counts_before else None,
            triton.cdiv(table.chunked.most_chunks, _CHUNKS_AT_ONCE),
            _CHUNKS_AT_ONCE,
        )
        if is_whole:
            return TrustRatios(*of_layers.unbind())
        return of_layers[0], of_layers[1]

    def _arguments_of(self, mode: str, has_ratio: bool) -> "_Arguments":
        """Return the arguments of a kernel that depend on the hyperparameters, cached until these change."""
        known = self._arguments.get((mode, has_ratio))
        if known is None:
            h, is_first = self.h, self.batch.is_first
            factors = factors_in_kernel(self.algorithm, has_ratio=has_ratio, is_first=is_first, h=h)
            known = _Arguments(
                tuple(factor.number for factor in factors),
                tuple(tl.constexpr(factor.kind) for factor in factors),
                arguments(h),
            )
            self._arguments[mode, has_ratio] = known
        return known


class _Arguments(NamedTuple):
    """The arguments of a kernel that depend on the hyperparameters."""

    numbers: tuple[float, ...]
    """The number of each factor."""

    kinds: tuple[Any, ...]
    """The kind of each factor, a compile-time constant."""

    h: Any


def device_of(table: LayerTable) -> AbstractContextManager[object]:
    """Return a context in which the device of the layers is the current one, as Triton requires."""
    device = table.device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def compiled(equation: Callable[..., Any]) -> Any:
    """Return an equation of an algorithm as a Triton function, with its calls bound to Triton's versions."""
    # Triton resolves the annotations too; all of them are Any or Number.
    names = {
        name: tl.float32 if value is Any or value is Number else value
        for name, value in equation.__globals__.items()
    }
    names |= {"tl": tl, "sqrt": root, "TrustRatios": trust_ratios}
    names |= {name: getattr(triton_ratio, name) for name in ("trust_ratio", "clip", "clipped", "over_lr")}
    return triton.jit(FunctionType(equation.__code__, names, equation.__name__))


def arguments(h: Any) -> Any:
    """Return the hyperparameters as arguments of a kernel: numbers, and flags as compile-time constants.

    A schedule can change the numbers without a new compilation. ``trust_clip`` becomes the bounds of the
    trust ratio, ``low`` and ``high``.
    """
    values = h._asdict()
    if values.get("trust_clip") is not None:
        values["low"], values["high"] = bounds(h.trust_clip)
        values["trust_clip"] = "larc" if values["trust_clip"] == "larc" else "number"
    return _namedtuple(tuple(values))(*map(_argument, values.values()))


def table_argument(table: CodeTable) -> CodeTable:
    """Return a table of codes as an argument of a kernel."""
    cells, first, shift = map(tl.constexpr, table[2:])
    return table._replace(cells=cells, first=first, shift=shift)


@cache
def _namedtuple(names: tuple[str, ...]) -> Any:
    return namedtuple("Hyperparameters", names)


def _argument(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_argument, value))
    if value is None:
        return None  # equations test it by ``is None``
    return tl.constexpr(value) if isinstance(value, bool | str) else float(value)
