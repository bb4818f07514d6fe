"""The optimizers: torch only, usable in any training loop."""

from lightning_lars.optim.eight_bit import LAMB8bit, LARS8bit
from lightning_lars.optim.lamb import LAMB
from lightning_lars.optim.lars import LARS
from lightning_lars.optim.novograd import NovoGrad

__all__ = ["LAMB", "LARS", "LAMB8bit", "LARS8bit", "NovoGrad"]
