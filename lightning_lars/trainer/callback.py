"""A common base class for callbacks of lightning.pytorch and pytorch_lightning.

The two packages define the same classes twice, and the CLI of each accepts only its own.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    import sys

    import lightning.pytorch
    from lightning_utilities.core import rank_zero

    # Each package, when imported, makes both log to its own logger. Users who silenced `lightning`'s logger
    # did not ask for the other.
    logger = None if "pytorch_lightning" in sys.modules else rank_zero.log
    import pytorch_lightning

    rank_zero.log = logger or rank_zero.log

    class Callback(lightning.pytorch.Callback, pytorch_lightning.Callback):
        """A callback for the Trainers and CLIs of both packages."""


__all__ = ["Callback"]
