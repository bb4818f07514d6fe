"""Fixes random seeds and the console for every test, and reports the number of skipped slow tests."""

import atexit
import functools
import gc
import importlib.metadata
import logging
import os
import random
import re
import sys
from pathlib import Path

# Before torch is imported, here and in the processes of tests: they share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No window opens where there is a screen.
os.environ["MPLBACKEND"] = "agg"

import numpy as np
import pytest
import rich
import torch
import torch.distributed as dist

# Every Trainer looks for callbacks in the metadata of all installed packages, which stay the same. Before
# Lightning is imported.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)

if not torch.cuda.is_available():
    # Before anything imports triton: its kernels then run on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

# The processes that tests start find this package and these tests from any folder, installed or not.
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

SLOW_LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Refuse names that hold an address, on which workers of pytest-xdist cannot agree, and set time limits.

    A test that hangs ends after the time in pyproject.toml, with its traceback. Ranks have as long, and tell
    where they are before their test ends; slow tests have more.
    """
    for item in items:
        if not item.get_closest_marker("timeout"):
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.timeout(300))
            elif item.get_closest_marker("distributed"):
                item.add_marker(pytest.mark.timeout(120))
    if addresses := [item.nodeid for item in items if re.search(r" at 0x[0-9a-f]{6}", item.nodeid)]:
        raise pytest.UsageError(f"give these tests an id, as theirs holds an address: {addresses}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    # Without a GPU, torch.manual_seed keeps the stack of each call for every kind of device.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def _console() -> None:
    # Lightning's RichProgressBar configures that of the whole process.
    rich.reconfigure()


@pytest.fixture(autouse=True)
def _loggers() -> None:
    # Examples that train many times keep those of Lightning from speaking, in the process of the tests too.
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.INFO)


@pytest.fixture(autouse=True)
def _figures():
    yield
    # Pyplot keeps those that nobody closes, and warns of them.
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Keep from it what tests of earlier files imported, too: they look for wrappers among all objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def process_group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pytest_collection_finish():
    """Keep what imports made from the garbage collector, and from whoever looks for objects by it.

    Also at the end, where pytest collects five times, which takes seconds; libraries find it as they left it.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


def pytest_deselected(items):
    """Count the slow tests that no marker asked for."""
    if all(item.get_closest_marker("slow") for item in items):
        stash = items[0].config.stash
        stash[SLOW_LEFT_OUT] = stash.get(SLOW_LEFT_OUT, 0) + len(items)


def pytest_sessionfinish(session):
    """Tell it to the process that the workers work for."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["slow_left_out"] = session.config.stash.get(SLOW_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Read it there: every worker has collected all tests."""
    if hasattr(node, "workeroutput"):  # it has not crashed
        node.config.stash[SLOW_LEFT_OUT] = node.workeroutput["slow_left_out"]


def pytest_terminal_summary(terminalreporter, config):
    """Say it."""
    if count := config.stash.get(SLOW_LEFT_OUT, 0):
        terminalreporter.write_line(f'{count} slow tests left out: -m "slow or not slow" runs all')
