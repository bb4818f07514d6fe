"""Optimizers to compare LARS and LAMB with: torch's fused optimizers, and published implementations."""

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
BASELINES = ("SGD(fused=True)", "AdamW(fused=True)")
"""Lower bounds on the time of a step: for LARS, and for LAMB."""


class Candidate(NamedTuple):
    """An optimizer in the comparison."""

    baseline: str
    bytes_moved: int
    """Bytes that a step must read and write per float32 parameter; in two passes, if it needs norms."""

    build: Build

    @property
    def is_peer(self) -> bool:
        """Whether it is a published implementation."""
        return isinstance(self.build, partial)


_LARS: dict[str, Any] = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-4}
_LAMB: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
_TIMM = "timm==1.0.31"
_KOZISTR = "pytorch_optimizer==4.1.0"

Peer = tuple[str, str, str, str, dict[str, Any]]
"""Label in the table, requirement, module, class, arguments."""

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


def candidates() -> dict[str, Candidate]:
    """Return all optimizers to compare, each baseline first; peers only if they can be installed."""
    sgd, adamw = BASELINES
    return {
        sgd: Candidate(sgd, 20, lambda params: SGD(params, **_LARS, fused=True)),
        "LARS": Candidate(sgd, 28, lambda params: LARS(grouped(params), **_LARS)),
        "LARS(nesterov=True)": Candidate(
            sgd, 28, lambda params: LARS(grouped(params), **_LARS, nesterov=True)
        ),
        "LARS(fused=False)": Candidate(sgd, 28, lambda params: LARS(grouped(params), **_LARS, fused=False)),
        **_published(_LARS_PEERS, sgd, 28),
        adamw: Candidate(adamw, 28, lambda params: AdamW(params, **_LAMB, fused=True)),
        "LAMB": Candidate(adamw, 40, lambda params: LAMB(grouped(params), **_LAMB)),
        "LAMB(fused=False)": Candidate(adamw, 40, lambda params: LAMB(grouped(params), **_LAMB, fused=False)),
        **_published(_LAMB_PEERS, adamw, 40),
    }


def find(label: str) -> Build | None:
    """Return a function that builds a published optimizer, or None if it cannot be installed."""
    by_label = {peer[0]: peer for peer in (*_LARS_PEERS, *_LAMB_PEERS)}
    _, requirement, module, name, arguments = by_label[label]
    try:
        return partial(getattr(peer(requirement, module), name), **arguments)
    except pytest.skip.Exception as reason:
        print(f"without {label}: {reason}")
        return None


def _published(peers: tuple[Peer, ...], baseline: str, bytes_moved: int) -> dict[str, Candidate]:
    builds = {label: find(label) for label, *_ in peers}
    return {label: Candidate(baseline, bytes_moved, build) for label, build in builds.items() if build}
