"""Muon, where torch has it."""

import pytest
import torch

MUON = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(MUON is None, reason="torch.optim.Muon is in torch 2.9 and newer")
