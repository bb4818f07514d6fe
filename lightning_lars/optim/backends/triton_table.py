"""A table on the device with the addresses of all tensors, so that one launch covers all layers."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2048
"""The number of elements that one program handles."""

# How many captures between two eager steps have pinned memory allocated in advance.
_SPARES = 8


class Chunks(NamedTuple):
    """How layers are divided into chunks, one for each program; all tensors are int64."""

    sizes: Tensor
    """The number of elements of each layer, shape ``(layers,)``."""

    layer_of_chunk: Tensor
    """The index of the layer of each chunk, shape ``(chunks,)``."""

    offset_of_chunk: Tensor
    """The offset of each chunk in its layer, shape ``(chunks,)``."""

    first_chunk: Tensor
    """The index of the first chunk of each layer, then the number of chunks: shape ``(layers + 1,)``."""

    direction_offsets: Tensor
    """The offset of each layer in scratch memory for all of them, a multiple of 16, shape ``(layers,)``."""

    counts: tuple[int, int]
    """Both properties below, as numbers on the host."""

    @property
    def most_chunks(self) -> int:
        """The number of chunks of the largest layer."""
        return self.counts[0]

    @property
    def room(self) -> int:
        """The number of elements of scratch memory for all layers."""
        return self.counts[1]


class LayerTable(NamedTuple):
    """The addresses of the tensors of several layers, and how the layers are divided into chunks."""

    columns: Tensor
    """Addresses of each list of tensors, then each list of numbers: int64, shape ``(columns, layers)``."""

    chunked: Chunks

    rows: Tensor
    """The same as ``columns``, on the CPU."""

    def with_gradients(self, addresses: Sequence[int]) -> "LayerTable":
        """Return the table of the same layers, with their gradients at these addresses."""
        rows = self.rows.clone()
        rows[1] = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        return self._replace(columns=_on_device(rows, self.device, []), rows=rows)

    @property
    def device(self) -> torch.device:
        """The device of the layers."""
        return self.columns.device

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self.chunked.sizes.numel()

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return self.chunked.layer_of_chunk.numel()


class _Made(NamedTuple):
    """A table, and the arguments it was made from."""

    rows: list[list[int]]
    sizes: tuple[int, ...]
    table: LayerTable
    stream: int
    spares: Tensor | None
    """Pinned memory for rows during a capture, when some versions of torch cannot pin memory."""


class LayerTables:
    """Makes the tables of a step, and copies to the device only those that changed since the last step.

    Each optimizer has its own, so that tables are copied on the stream of its steps. The tables of the last
    step are kept. Tables that a CUDA graph has captured live as long as the optimizer, because every replay
    reads them.
    """

    def __init__(self) -> None:
        self._made: list[_Made | None] = []
        self._next = 0
        self._captured: dict[tuple[int, int], tuple[object, ...]] = {}

    def start_step(self) -> None:
        """Start over with the first table of a step."""
        del self._made[self._next :]
        self._next = 0

    def table(self, tensors: Sequence[Sequence[Tensor]], numbers: Sequence[Sequence[int]] = ()) -> LayerTable:
        """Return the next table of this step.

        While a CUDA graph is captured, the copy of a new table to the device becomes part of the graph, from
        host memory that nothing else writes, because gradients may be allocated inside the capture.

        Args:
            tensors: Lists with one tensor for each layer, on one device: weights, gradients, then state.
            numbers: Lists with one number for each layer.
        """
        weights = tensors[0]
        device = weights[0].device
        rows = [[tensor.data_ptr() for tensor in of_layers] for of_layers in tensors]
        rows.extend(map(list, numbers))
        sizes = tuple(w.numel() for w in weights)
        is_captured, stream = is_capturing(device), current_stream(device)
        if self._next == len(self._made):
            self._made.append(None)
        last = self._made[self._next]
        # A copy on another stream may not have finished yet; before a capture, all have.
        if last is not None and (last.table.device != device or not (last.stream == stream or is_captured)):
            last = None
        pinned: list[Tensor] = []
        spares = None if last is None else last.spares
        if last is not None and last.sizes == sizes:
            chunked = last.table.chunked
        else:
            chunked = _chunks(sizes, device, pinned)
        if last is not None and last.rows == rows:
            columns, host = last.table.columns, last.table.rows
        else:
            host = torch.tensor(rows, dtype=torch.int64, device="cpu")
            if is_captured and spares is not None and len(spares) and spares[0].shape == host.shape:
                host, spares = spares[0].copy_(host), spares[1:]
            columns = _on_device(host, device, pinned)
        table = LayerTable(columns, chunked, host)
        if is_captured:
            # Keeps the state alive too, which loading a state dict would replace.
            state = list(chain.from_iterable(tensors[2:]))
            self._captured.setdefault((id(columns), id(chunked)), (table, pinned, state))
            if last is not None:
                # Only a replay copies the table, so eager steps cannot use it.
                self._made[self._next] = last._replace(spares=spares)
        else:
            if device.type == "cuda" and (
                spares is None or spares.shape[1:] != columns.shape or not len(spares)
            ):
                spares = columns.new_empty(_SPARES, *columns.shape, device="cpu", pin_memory=True)
            self._made[self._next] = _Made(rows, sizes, table, stream, spares)
        self._next += 1
        return table

    def forget(self) -> None:
        """Forget all tables, except those that CUDA graphs read."""
        self._made.clear()
        self._next = 0


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """Return the current stream of a device, 0 for the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _chunks(sizes: Iterable[int], device: torch.device, pinned: list[Tensor]) -> Chunks:
    size = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    count = (size + CHUNK - 1) // CHUNK
    first = torch.cat([count.new_zeros(1), count.cumsum(0)])
    layer = torch.repeat_interleave(torch.arange(size.numel(), device="cpu"), count)
    offset = (torch.arange(layer.numel(), device="cpu") - first[layer]) * CHUNK
    ends = ((size + 15) // 16 * 16).cumsum(0)
    direction = torch.cat([ends.new_zeros(1), ends[:-1]])
    on_device = (_on_device(tensor, device, pinned) for tensor in (size, layer, offset, first, direction))
    size, layer, offset, first, direction = on_device
    return Chunks(size, layer, offset, first, direction, (int(count.max()), int(ends[-1])))


def _on_device(tensor: Tensor, device: torch.device, pinned: list[Tensor]) -> Tensor:
    """Copy a tensor to the device without synchronizing, and append the pinned source to the list."""
    if device.type != "cuda":
        return tensor.to(device)
    pinned.append(tensor if tensor.is_pinned() else tensor.pin_memory())
    return pinned[-1].to(device, non_blocking=True)
