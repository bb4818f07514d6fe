"""A lookup finds the code that torchao's search finds, for every number."""

import pytest
import torch

from lightning_lars.optim.state.code_table import code_table
from tests.support.eight_bit import needs_torchao

needs_torchao()
quantization = pytest.importorskip("torchao.optim.quant_utils", reason="there is no torchao for this system")
INF = float("inf")


def looked_up(x, table):
    """The codes of some numbers, as the kernel finds them."""
    bits = x.view(torch.int32) & 0x7FFFFFFF
    cell = ((bits >> table.shift) - table.first).clamp_min(0)
    code = table.lowest[torch.where(x < 0, cell + table.cells, cell).long()].long()
    return code + (x >= table.thresholds[code + 1])


def neighbours(x, count):
    """Some numbers, and those right above and below each."""
    numbers = [x]
    for end in (INF, -INF):
        beside = x
        for _ in range(count):
            beside = torch.nextafter(beside, torch.full_like(x, end))
            numbers.append(beside)
    return torch.cat(numbers)


MAPS = {
    "signed": quantization.create_dynamic_map(signed=True),
    "unsigned": quantization.create_dynamic_map(signed=False),
    "linear": torch.linspace(-1, 1, 256).tolist(),
    "crowded": (torch.linspace(-1, 1, 256) ** 5).tolist(),
}


@pytest.mark.parametrize("name", MAPS)
def test_the_code_is_that_of_a_search(name):
    qmap = torch.tensor(MAPS[name])
    table = code_table(qmap)
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(2**18, generator=generator)
    small = random * 10 ** torch.empty_like(random).uniform_(-45, 0, generator=generator)
    middles = (qmap[1:] + qmap[:-1]) / 2
    hard = neighbours(torch.cat([qmap, middles, table.thresholds[1:-1], torch.zeros(1)]), 3)
    ends = (torch.arange(table.first, table.first + table.cells, dtype=torch.int32) << table.shift).view(
        torch.float32
    )
    x = torch.cat([random, small, hard, neighbours(ends, 1)])
    x = torch.cat([x, -x])
    x = x[x.abs() <= 1]
    assert torch.equal(looked_up(x, table), quantization.quantize_8bit_with_qmap(x, qmap).long())


@pytest.mark.parametrize("name", MAPS)
def test_the_thresholds_are_the_lowest_numbers_of_their_codes(name):
    qmap = torch.tensor(MAPS[name])
    thresholds = code_table(qmap).thresholds[1:-1]
    below = torch.nextafter(thresholds, torch.full_like(thresholds, -INF))
    codes = torch.arange(1, 256)
    assert torch.equal(quantization.quantize_8bit_with_qmap(thresholds, qmap).long(), codes)
    assert torch.equal(quantization.quantize_8bit_with_qmap(below, qmap).long(), codes - 1)


@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_the_cells_of_torchaos_maps_fit_the_cache(name):
    table = code_table(torch.tensor(MAPS[name]))
    assert table.lowest.numel() < 8 * 1024
    assert table.lowest.dtype == torch.uint8
