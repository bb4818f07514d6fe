"""A mesh, for tensors laid out as those of many; and chunks that Triton's interpreter is quick with."""

import pytest
from torch.distributed.device_mesh import init_device_mesh

from tests.support.chunks import small_chunks
from tests.support.interpreter import prepare_once


@pytest.fixture(autouse=True, scope="session")
def _interpreter() -> None:
    prepare_once()


@pytest.fixture
def mesh(process_group):
    """A mesh of this process alone."""
    return init_device_mesh("cpu", (1,))


@pytest.fixture(name="small_chunks")
def _small_chunks():
    """Chunks that Triton's interpreter is quick with."""
    with small_chunks():
        yield
