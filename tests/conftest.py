"""Every test starts from the same random numbers, and the same console."""

import os

import pytest
import rich
import torch

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
