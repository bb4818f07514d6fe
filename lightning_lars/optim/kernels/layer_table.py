"""Where the tensors of all layers are, in a table on the device, so that one launch reaches all of them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 8192
"""Elements that one program works on."""

_ALIGNMENT = 16


class LayerTable(NamedTuple):
    """Addresses of the tensors of some layers, and how the layers are divided into chunks."""

    columns: Tensor
    """Shape ``(columns, layers)``, int64: a row for each list of tensors, then for each of numbers."""

    sizes: Tensor
    """Elements of each layer, shape ``(layers,)``, int64."""

    layer_of_chunk: Tensor
    """Shape ``(chunks,)``, int64."""

    offset_of_chunk: Tensor
    """Where in its layer a chunk begins, shape ``(chunks,)``, int64."""

    first_chunk: Tensor
    """Of each layer, and after the last: shape ``(layers + 1,)``, int64."""

    most_chunks: int
    """Of any layer."""

    are_aligned: bool
    """Whether all addresses are multiples of 16 bytes."""

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return self.sizes.numel()

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return self.layer_of_chunk.numel()


class LayerTables:
    """Makes the tables of a step; what has not changed since the last step stays on the device."""

    def __init__(self) -> None:
        self._columns: dict[tuple[tuple[int, ...], torch.device], tuple[list[list[int]], Tensor]] = {}

    def table(self, tensors: Sequence[Sequence[Tensor]], numbers: Sequence[Sequence[int]] = ()) -> LayerTable:
        """Return the table of some layers.

        Args:
            tensors: Lists with a tensor for each layer, on one device; the first holds the weights.
            numbers: Lists with a number for each layer.

        Raises:
            RuntimeError: While a CUDA graph is captured, if addresses have changed since the last step.
        """
        device = tensors[0][0].device
        addresses = [[tensor.data_ptr() for tensor in of_layers] for of_layers in tensors]
        rows = [*addresses, *map(list, numbers)]
        key = (tuple(addresses[0]), device)
        known = self._columns.get(key)
        if known is None or known[0] != rows:
            known = rows, _on_device(torch.tensor(rows, dtype=torch.int64), device)
            self._columns[key] = known
        are_aligned = all(address % _ALIGNMENT == 0 for row in addresses for address in row)
        return LayerTable(known[1], *_chunks(tuple(w.numel() for w in tensors[0]), device), are_aligned)


@lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    size = torch.tensor(sizes, dtype=torch.int64)
    count = (size + CHUNK - 1) // CHUNK
    first = torch.cat([count.new_zeros(1), count.cumsum(0)])
    layer = torch.repeat_interleave(torch.arange(len(sizes)), count)
    offset = (torch.arange(layer.numel()) - first[layer]) * CHUNK
    most_chunks = int(count.max())
    size, layer, offset, first = (_on_device(tensor, device) for tensor in (size, layer, offset, first))
    return size, layer, offset, first, most_chunks


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "addresses of parameters, gradients or state are new, and a CUDA graph would keep those of now: "
            "take two steps before the capture, and keep the gradients in place, zero_grad(set_to_none=False)"
        )
    return tensor.pin_memory().to(device, non_blocking=True)
