"""What is timed beside LARS and LAMB: torch's fused optimizers, and those that others have published."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from benchmarks.model_shapes import grouped
from lightning_lars import LAMB, LARS
from tests.support.peers import peer

Build = Callable[[list[Parameter]], torch.optim.Optimizer]
FLOORS = ("SGD(fused=True)", "AdamW(fused=True)")
"""What a step cannot be faster than, without layers: of LARS, and of LAMB."""


class Rival(NamedTuple):
    """An optimizer in the race."""

    floor: str
    bytes_moved: int
    """For each float32 parameter, that a step has to read and write; in two passes, if it has norms."""

    build: Build

    @property
    def is_peer(self) -> bool:
        """Whether others have published it."""
        return isinstance(self.build, partial)


_LARS: dict[str, Any] = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-4}
_LAMB: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
_TIMM = "timm==1.0.31"
_KOZISTR = "pytorch_optimizer==4.1.0"

Peer = tuple[str, str, str, str, dict[str, Any]]
"""What the table calls it, requirement, module, class, arguments."""

_LARS_PEERS: tuple[Peer, ...] = (
    ("timm Lars, foreach", _TIMM, "timm.optim.lars", "Lars", {**_LARS, "foreach": True}),
    ("timm Lars, loop", _TIMM, "timm.optim.lars", "Lars", {**_LARS, "foreach": False}),
    ("torch_optimizer LARS", "torch_optimizer==0.3.0", "torch_optimizer.lars", "LARS", _LARS),
    ("pytorch_optimizer LARS", _KOZISTR, "pytorch_optimizer.optimizer.lars", "LARS", _LARS),
    ("open_lars LARS", "open_lars==0.1.1", "open_lars.lars", "LARS", _LARS),
    ("bitsandbytes PytorchLARS", "bitsandbytes==0.50.2", "bitsandbytes.optim.lars", "PytorchLARS", _LARS),
)
_LAMB_PEERS: tuple[Peer, ...] = (
    ("timm Lamb, foreach", _TIMM, "timm.optim.lamb", "Lamb", {**_LAMB, "foreach": True}),
    ("timm Lamb, loop", _TIMM, "timm.optim.lamb", "Lamb", {**_LAMB, "foreach": False}),
    ("torch_optimizer Lamb", "torch_optimizer==0.3.0", "torch_optimizer.lamb", "Lamb", _LAMB),
    ("pytorch_optimizer Lamb", _KOZISTR, "pytorch_optimizer.optimizer.lamb", "Lamb", _LAMB),
)


def rivals() -> dict[str, Rival]:
    """Return all of them, a floor before those that it is the floor of; peers that can be had."""
    sgd, adamw = FLOORS
    return {
        sgd: Rival(sgd, 20, lambda params: SGD(params, **_LARS, fused=True)),
        "LARS": Rival(sgd, 28, lambda params: LARS(grouped(params), **_LARS)),
        "LARS(nesterov=True)": Rival(sgd, 28, lambda params: LARS(grouped(params), **_LARS, nesterov=True)),
        "LARS(fused=False)": Rival(sgd, 28, lambda params: LARS(grouped(params), **_LARS, fused=False)),
        **_published(_LARS_PEERS, sgd, 28),
        adamw: Rival(adamw, 28, lambda params: AdamW(params, **_LAMB, fused=True)),
        "LAMB": Rival(adamw, 40, lambda params: LAMB(grouped(params), **_LAMB)),
        "LAMB(fused=False)": Rival(adamw, 40, lambda params: LAMB(grouped(params), **_LAMB, fused=False)),
        **_published(_LAMB_PEERS, adamw, 40),
    }


def find(label: str) -> Build | None:
    """Return how to build a published optimizer, None where it cannot be installed."""
    by_label = {peer[0]: peer for peer in (*_LARS_PEERS, *_LAMB_PEERS)}
    _, requirement, module, name, arguments = by_label[label]
    try:
        return partial(getattr(peer(requirement, module), name), **arguments)
    except pytest.skip.Exception as reason:
        print(f"without {label}: {reason}")
        return None


def _published(peers: tuple[Peer, ...], floor: str, bytes_moved: int) -> dict[str, Rival]:
    builds = {label: find(label) for label, *_ in peers}
    return {label: Rival(floor, bytes_moved, build) for label, build in builds.items() if build}
