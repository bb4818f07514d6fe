"""Replaces a checkpoint on a full disk; arguments are its folder, and that of temporary files."""

import json
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lars import LAMB
from tests.support.boring import boring, trainer


class GrowsAndFillsTheDisk(Callback):
    """From a step on, the disk is full and the checkpoint larger, as with optimizer state of more layers."""

    def __init__(self, disk: Path, step: int):
        self.disk, self.step = disk, step
        self.state = b""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.state = os.urandom(100_000)
            with (self.disk / "others").open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

    def state_dict(self):
        return {"state": self.state}


def steps(path: Path) -> int | None:
    """The steps of a checkpoint; None where it cannot be loaded."""
    try:
        return torch.load(path, weights_only=False)["global_step"]
    except (EOFError, OSError, RuntimeError):
        return None


def main(disk: Path, temporary: Path) -> None:
    warnings.simplefilter("ignore")
    tempfile.tempdir = str(temporary)
    saving = ModelCheckpoint(disk, filename="{step}", every_n_train_steps=2, save_top_k=0, save_last=True)
    keeping = ModelCheckpoint(disk, filename="kept-{step}", every_n_train_steps=4, save_top_k=-1)
    callbacks = [saving, keeping, GrowsAndFillsTheDisk(disk, step=5)]
    error = None
    try:
        trainer(disk, enable_checkpointing=True, callbacks=callbacks).fit(
            boring(partial(LAMB, lr=0.1), width=64)
        )
    except OSError as raised:
        error = str(raised)
    (disk / "others").unlink()
    left = {path.name: steps(path) for path in disk.glob("*.ckpt")}
    print(json.dumps({"error": error, "left": left}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
