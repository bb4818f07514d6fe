"""A mesh, for tensors that are laid out as those of many."""

import pytest
from torch.distributed.device_mesh import init_device_mesh


@pytest.fixture
def mesh(process_group):
    """A mesh of this process alone."""
    return init_device_mesh("cpu", (1,))
