"""The kernels in Triton compile for GPUs, with wide loads, also where there is none; and their table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_lars.optim.kernels.layer_table import CHUNK, LayerTables

pytest.importorskip("triton", reason="there is no triton for this system")
COMPILE = Path(__file__).parents[1] / "workers" / "compile_kernels.py"


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_every_kernel_compiles_for_a_gpu_and_moves_16_bytes_at_a_time(capability):
    # In a process of its own, as the interpreter takes the place of the compiler in this one.
    compiles = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, COMPILE, str(capability)], capture_output=True, text=True, check=False, env=compiles
    )
    assert run.returncode == 0, run.stderr
    compiled = json.loads(run.stdout)
    assert len(compiled) == 2 * 9 + 1
    for name, (instructions, size) in compiled.items():
        assert size > 0
        if "norms" not in name:
            assert instructions["ld.global.v4"] >= 2, name
        if "descend" in name:
            assert instructions["st.global.v4"] >= 1, name


def test_the_table_has_an_address_for_every_layer_and_a_chunk_for_every_part_of_one():
    layers = [torch.ones(3), torch.ones(2 * CHUNK), torch.ones(0), torch.ones(CHUNK + 1)]
    grads = [torch.ones_like(layer) for layer in layers]
    table = LayerTables().table((layers, grads), ([0, 1, 0, 1],))
    pointers = [[t.data_ptr() for t in tensors] for tensors in (layers, grads)]
    assert table.columns.tolist() == [*pointers, [0, 1, 0, 1]]
    assert table.sizes.tolist() == [3, 2 * CHUNK, 0, CHUNK + 1]
    assert table.layer_of_chunk.tolist() == [0, 1, 1, 3, 3]
    assert table.offset_of_chunk.tolist() == [0, 0, CHUNK, 0, CHUNK]
    assert table.first_chunk.tolist() == [0, 1, 3, 3, 5]
    assert (table.layers, table.chunks, table.most_chunks) == (4, 5, 2)


def test_a_table_is_made_again_only_where_an_address_has_changed():
    layers, grads = [torch.ones(3)], [torch.ones(3)]
    tables = LayerTables()
    first = tables.table((layers, grads))
    assert tables.table((layers, grads)).columns is first.columns
    other = tables.table((layers, [torch.ones(3)])).columns
    assert other is not first.columns
    assert other[1].item() != grads[0].data_ptr()


def test_an_address_that_is_no_multiple_of_16_bytes_is_told_from_those_that_are():
    memory = torch.ones(8)
    assert LayerTables().table(([memory],)).are_aligned
    assert not LayerTables().table(([memory], [memory[1:]])).are_aligned
