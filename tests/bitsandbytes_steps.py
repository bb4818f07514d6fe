"""Takes steps with the classes of bitsandbytes as they are installed, compiled library and all.

Run as ``python -m tests.bitsandbytes_steps FOLDER FILE``, with the folder that it is installed in.
"""

import sys

import torch
from torch.nn import Parameter

STEPS = 5
OPTIONS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05}
CASES = {"default": {"max_unorm": 0.02}, "loose": {"max_unorm": 0.5}}


def start():
    """A large layer, the same every time."""
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(100))


def steps(optimizer):
    """Yield the layer after every step."""
    (w,) = optimizer.param_groups[0]["params"]
    for step in range(STEPS):
        w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        yield w.detach().clone()


if __name__ == "__main__":
    folder, file = sys.argv[1:]
    sys.path.insert(0, folder)
    import bitsandbytes

    seen = {
        (name, case): list(
            steps(getattr(bitsandbytes.optim, name)([Parameter(start())], **OPTIONS, **options))
        )
        for name in ("LARS", "LARS32bit", "LARS8bit", "PytorchLARS")
        for case, options in CASES.items()
    }
    torch.save(seen, file)
