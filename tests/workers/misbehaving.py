"""Functions for several ranks that fail in every way, and some that do not."""

import ctypes
import os
import random
import sys
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist


def add_up(number):
    """What all ranks add up to."""
    total = torch.tensor(float(number + dist.get_rank()))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def hang(rank):
    """Wait, on one rank, for what never comes; the others wait for it in a barrier."""
    print("going to bed")
    if dist.get_rank() == rank:
        sleep_forever()
    dist.barrier()


def sleep_forever():
    while True:
        time.sleep(1)


def exit_early(rank):
    print("leaving")
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def crash(rank):
    """Read where there is no memory."""
    if dist.get_rank() == rank:
        ctypes.string_at(0)
    dist.barrier()


def fail(rank):
    print("about to fail", file=sys.stderr)
    if dist.get_rank() == rank:
        raise ValueError("a wrong value")
    dist.barrier()


def threads_of_the_server():
    """A fork of a process with several threads can wait forever for a lock that another thread held."""
    return len(os.listdir(f"/proc/{os.getppid()}/task"))


def return_what_cannot_be_sent():
    return lambda: None


def leave_traces():
    """Change all that a process has one of; return what of it was there."""
    found = traces()
    os.environ["LEFT_BEHIND"] = "1"
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(dist.get_rank() + 7)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)
    random.seed(3), np.random.seed(3)
    warnings.simplefilter("ignore")
    os.chdir("/")
    return found


def traces():
    return {
        "environment": os.environ.get("LEFT_BEHIND"),
        "dtype": str(torch.get_default_dtype()),
        "random": torch.rand(()).item(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "filters": len(warnings.filters),
        "folder": os.getcwd(),
        "group": dist.get_world_size(),
    }
