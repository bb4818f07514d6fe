"""A step with 8-bit state takes over what the last one found only if none of it has changed.

Every kind of change comes after a step that has taken it over, to an optimizer that may take over and to one
that looks at everything in each step, which must stay equal to the bit.
"""

import pytest
import torch
from torch.nn import Parameter

from lightning_lars import LAMB8bit, LARS8bit
from lightning_lars.optim.backends import choice
from tests.support.plans import Found, give_gradients

pytest.importorskip("triton", minversion="3.3", reason="there is no triton for this system")
pytest.importorskip("torchao", reason="8-bit state needs torchao")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _in_triton(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(choice, "TRITON_DEVICES", {"cpu"})


def with_another_rate(params, optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 0.01


def gradients_elsewhere(params, optimizer):
    for p in params.values():
        p.grad = p.grad.clone()


def with_a_loaded_state_dict(params, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def scales_elsewhere(params, optimizer):
    for value in optimizer.state[params["weight"]].values():
        if hasattr(value, "scale"):
            value.scale = 2 * value.scale


def map_of_another_optimizer(params, optimizer):
    for value in optimizer.state[params["weight"]].values():
        if hasattr(value, "qmap"):
            value.qmap = value.qmap / 2


def moments_to_32_bits(params, optimizer):
    optimizer.param_groups[0]["min_8bit_size"] = 10_000


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (with_another_rate, [True, True, True]),
        (gradients_elsewhere, [True, True, True]),
        (scales_elsewhere, [False, True, True]),
        # The step after the change reads this map and writes with its own, the next one finds that changed.
        (map_of_another_optimizer, [False, True]),
        (with_a_loaded_state_dict, [True, True]),
        (moments_to_32_bits, [False, True, True]),
    ],
)
@pytest.mark.parametrize("optimizer_class", [LARS8bit, LAMB8bit])
def test_steps_with_8_bit_state_take_over_what_they_found(optimizer_class, change, found, monkeypatch):
    named = [
        {
            "weight": Parameter(torch.linspace(-1, 2, 512, device=DEVICE)),
            "bias": Parameter(torch.ones(4, device=DEVICE)),
        }
        for _ in range(2)
    ]
    repeats, looks_again = (
        optimizer_class([{"params": [p]} for p in params.values()], lr=0.1, min_8bit_size=256)
        for params in named
    )
    seen = Found(monkeypatch)
    for step in range(6):
        for params, optimizer in zip(named, (repeats, looks_again), strict=True):
            give_gradients(params, step)
            if step == 3:
                change(params, optimizer)
            if optimizer is looks_again:
                optimizer._plan = None
            optimizer.step()
        for p, other in zip(*(params.values() for params in named), strict=True):
            assert torch.equal(p, other)
            for key, value in repeats.state[p].items():
                expected = looks_again.state[other][key]
                assert type(value) is type(expected)
                for part in ("codes", "scale", "qmap") if hasattr(value, "codes") else ():
                    assert torch.equal(getattr(value, part), getattr(expected, part))
    assert seen.steps == [True, *found]
