"""Trains in every set-up on this process and its peers, and leaves what it saw in a folder, a file a process.

Run as ``python -m tests.workers.equal_to_one_device FOLDER WORLD_SIZE``, which starts the processes.
"""

import os
import sys
import tempfile
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor.debug import CommDebugMode

from tests.support.setups import (
    ON_FOUR,
    ON_TWO,
    ddp_zero,
    fsdp2,
    full_shard,
    sequence_parallel,
)
from tests.support.small_network import CASES, RESUMED, batches, floats, loss_of
from tests.workers.edges import seen_at_edges

RESUMED_CASES = ["LARS nesterov", "LAMB clipping"]
# With parts of some layers on some processes only, and gradients that must be added up first.
IN_TRITON = [(full_shard, 2), (sequence_parallel, 2), (fsdp2, 4)]
IN_TRITON_CASES = ["LARS nesterov", "LAMB"]


def step(setup, batch):
    """Take one step and return the collectives of the optimizer in it."""
    setup.optimizer.zero_grad()
    loss_of(setup.wrapped(setup.part(batch))).backward()
    with CommDebugMode() as communication:
        setup.optimizer.step()
    return {str(operation): count for operation, count in communication.get_comm_counts().items()}


def train(make, case):
    """Take five steps; return all that can be compared with one device."""
    setup = make(case)
    seen = {"values": [], "ratios": [], "collectives": []}
    for number, batch in enumerate(batches(), 1):
        seen["collectives"].append(step(setup, batch))
        seen["values"].append(setup.values())
        if make is not ddp_zero:
            ratios = setup.optimizer.trust_ratios()
            seen["ratios"].append(floats(ratios))
            seen["dtypes"] = {ratio.dtype for ratio in ratios.values()}
        if number == RESUMED and case in RESUMED_CASES and make is not ddp_zero:
            seen["full"] = state(setup, full=True)
            sharded = state(setup, full=False)
    if case in RESUMED_CASES and make is not ddp_zero:
        seen["resumed"] = {
            "full": resume(make, case, seen["full"], full=True),
            "sharded": resume(make, case, sharded, full=False),
        }
    return seen


def state(setup, full):
    """What a checkpoint holds, read again from a file."""
    saved = get_state_dict(setup.wrapped, setup.optimizer, options=StateDictOptions(full_state_dict=full))
    with tempfile.TemporaryFile() as file:
        torch.save(saved, file)
        file.seek(0)
        return torch.load(file, weights_only=False)


def resume(make, case, saved, full):
    """Go on from a checkpoint, in the same set-up, and return where it ends."""
    setup = make(case)
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


def train_with_local_norms(make, case):
    """Take five steps as an optimizer that takes the norm of a shard for that of its layer."""
    setup = make(case)
    with patch("lightning_lars.optim.norms.add_up", lambda squares, _: squares):
        for batch in batches():
            step(setup, batch)
    return setup.values()


def train_in_triton(make, case):
    """Take five steps by the kernels for GPUs, which Triton's interpreter runs here."""
    setup = make(case)
    for group in setup.optimizer.param_groups:
        group["fused"] = True  # or an error
    seen = {"values": [], "ratios": []}
    with patch("lightning_lars.optim.kernels.choice.TRITON_DEVICES", {"cpu"}):
        for batch in batches():
            step(setup, batch)
            seen["values"].append(setup.values())
            seen["ratios"].append(floats(setup.optimizer.trust_ratios()))
    return seen


def work(rank, world_size, folder, port):
    """Train in every set-up for this many processes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    of_another = {}
    for make in ON_TWO if world_size == 2 else ON_FOUR:
        seen = {}
        for case, (_, options) in CASES.items():
            if make is ddp_zero and "max_grad_norm" in options:
                continue
            seen[case] = train(make, case)
            if "full" in seen[case]:
                if case in of_another:
                    seen[case]["resumed"]["of another"] = resume(make, case, of_another[case], full=True)
                of_another[case] = seen[case]["full"]
            seen[case]["local norms"] = train_with_local_norms(make, case)
            if find_spec("triton") and (make, world_size) in IN_TRITON and case in IN_TRITON_CASES:
                seen[case]["in triton"] = train_in_triton(make, case)
        torch.save(seen, Path(folder) / f"{make.__name__} {world_size} {rank}.pt")
    if world_size == 2:
        torch.save(seen_at_edges(step), Path(folder) / f"edges {rank}.pt")
    dist.destroy_process_group()


def main(folder, world_size):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    mp.spawn(work, (world_size, folder, port), nprocs=world_size)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
