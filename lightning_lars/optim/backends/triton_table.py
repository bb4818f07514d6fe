"""Where the tensors of all layers are, in a table on the device, so that one launch reaches all of them."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 8192
"""Elements that one program works on."""

# Captures between two eager steps for which memory is pinned beforehand.
_SPARES = 8


class Chunks(NamedTuple):
    """How layers are divided among programs, all int64."""

    sizes: Tensor
    """Elements of each layer, shape ``(layers,)``."""

    layer_of_chunk: Tensor
    """Shape ``(chunks,)``."""

    offset_of_chunk: Tensor
    """Where in its layer a chunk begins, shape ``(chunks,)``."""

    first_chunk: Tensor
    """Of each layer, and after the last: shape ``(layers + 1,)``."""

    places: Tensor
    """Where a layer begins in memory for all of them, a multiple of 16, shape ``(layers,)``."""

    counts: tuple[int, int]

    @property
    def most_chunks(self) -> int:
        """Of any layer."""
        return self.counts[0]

    @property
    def room(self) -> int:
        """Elements of memory for all layers."""
        return self.counts[1]


class LayerTable(NamedTuple):
    """Addresses of the tensors of some layers, and how the layers are divided into chunks."""

    columns: Tensor
    """Shape ``(columns, layers)``, int64: a row for each list of tensors, then for each of numbers."""

    chunked: Chunks

    rows: Tensor
    """The same as ``columns``, on the CPU."""

    def with_gradients(self, addresses: Sequence[int]) -> "LayerTable":
        """Return the table of the same layers with gradients at other addresses."""
        rows = self.rows.clone()
        rows[1] = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        return self._replace(columns=_on_device(rows, self.device, []), rows=rows)

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return self.columns.device

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return self.chunked.sizes.numel()

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return self.chunked.layer_of_chunk.numel()


class _Made(NamedTuple):
    """A table, and what it was made of."""

    rows: list[list[int]]
    sizes: tuple[int, ...]
    table: LayerTable
    stream: int
    spares: Tensor | None
    """Pinned memory for the rows of captures, in which not every version of torch can pin any."""


class LayerTables:
    """Makes the tables of a step; what has not changed since the last step stays on the device.

    One optimizer's, so that they are made on the stream that it steps on. Those of the last step are kept,
    and those that a CUDA graph has captured as long as the optimizer, as every replay reads them.
    """

    def __init__(self) -> None:
        self._made: list[_Made | None] = []
        self._next = 0
        self._captured: dict[tuple[int, int], tuple[object, ...]] = {}

    def start_step(self) -> None:
        """Expect the first table of a step."""
        del self._made[self._next :]
        self._next = 0

    def table(self, tensors: Sequence[Sequence[Tensor]], numbers: Sequence[Sequence[int]] = ()) -> LayerTable:
        """Return the table of some layers, the next in this step.

        In a CUDA graph a table that is new is copied again in each replay, from memory that stays as it is:
        gradients may be made inside the capture.

        Args:
            tensors: Lists with a tensor for each layer, on one device; weights, gradients, then state.
            numbers: Lists with a number for each layer.
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
        # What another stream has copied may not be there yet; before a capture, all is.
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
            # With the state that it names: a state dict that is loaded puts other tensors in its place.
            state = list(chain.from_iterable(tensors[2:]))
            self._captured.setdefault((id(columns), id(chunked)), (table, pinned, state))
            if last is not None:
                # The table is copied in each replay, and is not there before.
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
        """Make all tables anew, but keep those that CUDA graphs read."""
        self._made.clear()
        self._next = 0


def is_capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """Return the stream that work on a device goes to, 0 on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _chunks(sizes: Iterable[int], device: torch.device, pinned: list[Tensor]) -> Chunks:
    size = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    count = (size + CHUNK - 1) // CHUNK
    first = torch.cat([count.new_zeros(1), count.cumsum(0)])
    layer = torch.repeat_interleave(torch.arange(size.numel(), device="cpu"), count)
    offset = (torch.arange(layer.numel(), device="cpu") - first[layer]) * CHUNK
    ends = ((size + 15) // 16 * 16).cumsum(0)
    places = torch.cat([ends.new_zeros(1), ends[:-1]])
    on_device = (_on_device(tensor, device, pinned) for tensor in (size, layer, offset, first, places))
    size, layer, offset, first, places = on_device
    return Chunks(size, layer, offset, first, places, (int(count.max()), int(ends[-1])))


def _on_device(tensor: Tensor, device: torch.device, pinned: list[Tensor]) -> Tensor:
    """Copy a tensor to the device without waiting for it, from pinned memory, which is added to the list."""
    if device.type != "cuda":
        return tensor.to(device)
    pinned.append(tensor if tensor.is_pinned() else tensor.pin_memory())
    return pinned[-1].to(device, non_blocking=True)
