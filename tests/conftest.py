"""Every test starts from the same random numbers, and the same console."""

import pytest
import rich
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _console() -> None:
    # Lightning's RichProgressBar configures that of the whole process.
    rich.reconfigure()
