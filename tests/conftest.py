"""Every test starts from the same random numbers, and the same console."""

import os

import pytest
import rich
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # Before anything imports triton: its kernels then run on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _console() -> None:
    # Lightning's RichProgressBar configures that of the whole process.
    rich.reconfigure()


@pytest.fixture
def process_group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
