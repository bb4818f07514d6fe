"""The optimizers: torch only, usable in any training loop."""

from lightning_lars.optim.lamb import LAMB
from lightning_lars.optim.lars import LARS

__all__ = ["LAMB", "LARS"]
