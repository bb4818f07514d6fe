"""Lightning's own CLI, with the mixin, or with callbacks around an unchanged module.

python examples/stock_cli.py fit --config examples/mixin.yaml
python examples/stock_cli.py fit --config examples/callbacks.yaml
"""

from images import Digits
from lightning import LightningModule
from lightning.pytorch.cli import LightningCLI

import lightning_lars  # noqa: F401  for the short names LARS, LAMB and WarmupDecayLR

if __name__ == "__main__":
    LightningCLI(LightningModule, Digits, subclass_mode_model=True)
