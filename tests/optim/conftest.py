"""A mesh, for tensors laid out as those of many; and chunks that Triton's interpreter is quick with."""

from unittest.mock import patch

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from lightning_lars.optim.backends import triton_table


@pytest.fixture
def mesh(process_group):
    """A mesh of this process alone."""
    return init_device_mesh("cpu", (1,))


@pytest.fixture
def small_chunks():
    """Chunks of 64 elements in blocks of 32, added up one by one: small layers have several, and cut ones.

    Triton's interpreter takes its time for every block. A GPU keeps the chunks that it has.
    """
    if torch.cuda.is_available():
        yield
        return
    from lightning_lars.optim.backends import triton_lamb, triton_lars, triton_layers

    sizes = [(module, "CHUNK", 64) for module in (triton_table, triton_lars, triton_lamb)]
    sizes += [(module, "BLOCK", 32) for module in (triton_lars, triton_lamb)]
    patches = [patch.object(*size) for size in (*sizes, (triton_layers, "_CHUNKS_AT_ONCE", 1))]
    for each in patches:
        each.start()
    yield
    for each in patches:
        each.stop()
