"""A common base class for callbacks of lightning.pytorch and pytorch_lightning.

The two packages define the same classes twice, and the CLI of each accepts only its own.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    import lightning.pytorch
    import pytorch_lightning

    class Callback(lightning.pytorch.Callback, pytorch_lightning.Callback):
        """A callback for the Trainers and CLIs of both packages."""


__all__ = ["Callback"]
