"""Tables in which a kernel looks up the nearest code of a number."""

from typing import NamedTuple

import torch
from torch import Tensor


class CodeTable(NamedTuple):
    """Where the nearest code of a number changes, and the cells in which to look for it.

    A cell holds the numbers of one sign whose exponent and leading bits of the mantissa are equal, so many
    bits that the code changes at most once in a cell. Two loads therefore find the code of a number, where a
    binary search takes ten, each of which waits for the one before.
    """

    thresholds: Tensor
    """The lowest number of each code, then infinity, shape ``(257,)``."""

    lowest: Tensor
    """The code of the lowest number of each cell, first the positive cells, shape ``(2 * cells,)``."""

    cells: int
    """The number of cells of each sign."""

    first: int
    """The leading bits of the first positive cell, which also holds all smaller numbers."""

    shift: int
    """The number of bits after the leading ones."""


def code_table(qmap: Tensor) -> CodeTable:
    """Return the table of a quantization map of torchao.

    Args:
        qmap: The values of the codes in ascending order, at most 1, shape ``(256,)``, on the CPU.
    """
    with torch.device("cpu"):
        thresholds = _thresholds(qmap)
        smallest, one = (int(_bits(x)) for x in (thresholds[1:].abs().min(), torch.ones(())))
        for shift in range(23, -1, -1):
            keys = torch.arange(smallest >> shift, (one >> shift) + 1, dtype=torch.int32)
            ends = torch.stack([keys << shift, ((keys + 1) << shift) - 1]).view(torch.float32)
            ends[0, 0] = 0.0
            low, high = _codes(torch.cat([ends, -ends.flip(0)], dim=1), qmap)
            if (high - low).max() <= 1:
                break
        end = thresholds.new_tensor([float("inf")])
        return CodeTable(
            torch.cat([thresholds, end]), low.to(torch.uint8), len(keys), smallest >> shift, shift
        )


def _thresholds(qmap: Tensor) -> Tensor:
    """Return the lowest number of each code, by bisection between the values of neighbouring codes."""
    codes = torch.arange(1, 256)
    below, at = _ordered(qmap[:-1]), _ordered(qmap[1:])
    while (at - below > 1).any():
        middle = below + (at - below) // 2
        reaches = _codes(_number(middle), qmap) >= codes
        below, at = torch.where(reaches, below, middle), torch.where(reaches, middle, at)
    return torch.cat([qmap.new_tensor([-float("inf")]), _number(at)])


def _codes(x: Tensor, qmap: Tensor) -> Tensor:
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    codes: Tensor = quantize_8bit_with_qmap(x, qmap)
    return codes.long()


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _ordered(x: Tensor) -> Tensor:
    """Return an integer for each number, in the order of the numbers, one apart for neighbours."""
    bits = _bits(x).long()
    return torch.where(bits < 0, -(bits + 2**31), bits)


def _number(ordered: Tensor) -> Tensor:
    """Invert :func:`_ordered`."""
    sign = torch.where(ordered < 0, -1.0, 1.0)
    return ordered.abs().to(torch.int32).view(torch.float32) * sign
