"""Trains in a set-up on several ranks, and returns what is compared with one device."""

import tempfile
from copy import deepcopy
from unittest.mock import patch

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor.debug import CommDebugMode

from tests.support.chunks import small_chunks
from tests.support.setups import SETUPS, alone
from tests.support.small_network import RESUMED, batches, floats, loss_of


def step(setup, batch):
    """Take one step and return the collectives of the optimizer in it."""
    setup.optimizer.zero_grad()
    loss_of(setup.wrapped(setup.part(batch))).backward()
    with CommDebugMode() as communication:
        setup.optimizer.step()
    return {str(operation): count for operation, count in communication.get_comm_counts().items()}


def train_all(name, cases, resumed, in_triton, with_local_norms):
    """Train with one optimizer after the other; return what was seen by case, by the way and the case.

    A rank learns how torch divides tensors with the first of them.
    """
    return {
        "here": {case: train(name, case, case in resumed) for case in cases},
        "in Triton": {case: train_in_triton(name, case) for case in in_triton},
        "with local norms": {case: train_with_local_norms(name, case) for case in with_local_norms},
    }


def train(name, case, resumes):
    """Take five steps; return what each did, a checkpoint between them, and where those end that resume."""
    setup = SETUPS[name](case)
    seen = {"values": [], "ratios": [], "collectives": []}
    for number, batch in enumerate(batches(), 1):
        seen["collectives"].append(step(setup, batch))
        seen["values"].append(setup.values())
        if name != "ddp_zero":
            ratios = setup.optimizer.trust_ratios()
            seen["ratios"].append(floats(ratios))
            seen["dtypes"] = {ratio.dtype for ratio in ratios.values()}
        if resumes and number == RESUMED:
            seen["full"], sharded = state(setup, full=True), state(setup, full=False)
    if resumes:
        seen["from shards"] = go_on(SETUPS[name](case), sharded, full=False)
        seen["from one device"] = go_on(SETUPS[name](case), state_on_one_device(case), full=True)
    return seen


def state(setup, full):
    """What a checkpoint holds, read again from a file."""
    saved = get_state_dict(setup.wrapped, setup.optimizer, options=StateDictOptions(full_state_dict=full))
    with tempfile.TemporaryFile() as file:
        torch.save(saved, file)
        file.seek(0)
        return torch.load(file, weights_only=False)


def state_on_one_device(case):
    """The checkpoint of the same steps on one device."""
    setup = alone(case)
    for batch in batches()[:RESUMED]:
        step(setup, batch)
    return state(setup, full=True)


def go_on(setup, saved, full):
    """Take the rest of the steps from a checkpoint, and return where they end."""
    # Not strict, as the block that is never used has no state.
    options = StateDictOptions(full_state_dict=full, strict=False)
    # A copy, as torch puts the parts of this process into it.
    model, optimizer = deepcopy(saved)
    set_state_dict(
        setup.wrapped, setup.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options
    )
    for batch in batches()[RESUMED:]:
        step(setup, batch)
    return setup.values()


def train_with_local_norms(name, case):
    """Take two steps as an optimizer that takes the norm of a shard for that of its layer."""
    setup = SETUPS[name](case)
    with patch("lightning_lars.sharding.norms.start_sums", lambda squares, _: lambda: squares):
        for batch in batches()[:2]:
            step(setup, batch)
    return setup.values()


def train_in_triton(name, case):
    """Take two steps by the kernels for GPUs, which Triton's interpreter runs here, in small chunks."""
    setup = SETUPS[name](case)
    for group in setup.optimizer.param_groups:
        group["fused"] = True  # or an error
    seen = {"values": [], "ratios": []}
    with small_chunks(), patch("lightning_lars.optim.backends.choice.TRITON_DEVICES", {"cpu"}):
        for batch in batches()[:2]:
            step(setup, batch)
            seen["values"].append(setup.values())
            seen["ratios"].append(floats(setup.optimizer.trust_ratios()))
    return seen
