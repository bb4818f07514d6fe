"""What Lightning's ``weights_only`` does, with releases before 2.6 too, which have no such argument."""

import inspect
import os
from unittest.mock import patch

from lightning.pytorch import Trainer

_HAS_ARGUMENT = "weights_only" in inspect.signature(Trainer.fit).parameters

# Releases before 2.6 always load so.
UNSAFELY = {"weights_only": False} if _HAS_ARGUMENT else {}


def safely(load, *arguments, **options):
    """Call a method of Lightning's that loads a checkpoint with ``weights_only=True``."""
    if _HAS_ARGUMENT:
        return load(*arguments, weights_only=True, **options)
    with patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
        return load(*arguments, **options)
