"""Calls a function on several ranks at once, each of them a process in a gloo process group of all.

A server that the first call of a test run starts imports torch, Lightning and the package once, and forks
every rank from there within milliseconds. All tests share the slow part, and no call finds anything that one
before it left: in the environment, in torch's defaults, in Lightning, in the caches of DTensor. Ranks meet in
a file in a folder of their own, so test runs side by side share neither ports nor files.
"""

import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

LIMIT = 60.0
# Seconds that the others may go on when a rank has failed; that a rank may take to end or say where it is.
GRACE, PATIENCE = 1.0, 10.0
# The end of what a rank printed is in the report; a function may print without bound.
REPORTED = 10_000
# What workers import at once or at their first step. What is not installed is left out.
PRELOADED = [
    "pytest",
    "tests.workers.edges",
    "tests.workers.eight_bit_lightning",
    "tests.workers.late_optimizer",
    "tests.workers.lightning_strategies",
    "torchao.optim.subclass_8bit",
]


class RankError(Exception):
    """A rank raised, died or hung: the message says which, what it printed, and where the others were."""


def on_ranks(world_size, function, *arguments, limit=LIMIT):
    """Return what ``function(*arguments)`` returns on each of so many ranks.

    Args:
        world_size: Number of ranks.
        function: A function that can be imported by its name.
        *arguments: Its arguments. They are pickled, as are the results.
        limit: Seconds after which the ranks that are not done are killed.

    Raises:
        RankError: A rank raised, died, or was not done in time.
    """
    # Of use to the call that starts the server, and to no other.
    multiprocessing.set_forkserver_preload(PRELOADED)
    call = pickle.dumps((function, arguments))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [_Rank(number, world_size, Path(folder), call, limit) for number in range(world_size)]
        try:
            _receive_all(ranks, limit)
            if any(rank.failure for rank in ranks):
                raise RankError("\n".join(rank.report() for rank in ranks))
            return [rank.result for rank in ranks]
        finally:
            for rank in ranks:
                rank.end()


def once(function):
    """As functools.cache, but what the function raised it raises again, and does not run again."""

    @functools.cache
    def outcome(*arguments):
        try:
            return function(*arguments), None
        except Exception as error:
            return None, error

    @functools.wraps(function)
    def known(*arguments):
        result, error = outcome(*arguments)
        if error is not None:
            raise error
        return result

    return known


class _Rank:
    """A rank, as the test sees it."""

    def __init__(self, number, world_size, folder, call, limit):
        self.number = number
        self.log = folder / f"{number}.log"
        self.is_done = False
        self.result = self.failure = None
        context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_be, args=(number, world_size, folder, call, theirs, limit))
        self.process.start()
        theirs.close()

    def receive(self):
        """Take what the process sent, or note that it died."""
        self.is_done = True
        try:
            self.result, self.failure = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            self.process.join()
            self.failure = f"died with exit code {self.process.exitcode}"

    def give_up(self):
        """Let the process print where it is, and note that it was not done."""
        self.is_done = True
        self.failure = "was not done"
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        until = time.monotonic() + PATIENCE
        while "most recent call first" not in self.printed() and time.monotonic() < until:
            time.sleep(0.02)

    def printed(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def report(self):
        return f"Rank {self.number} {self.failure or 'was done'}. It printed:\n{self.printed()[-REPORTED:]}"

    def end(self):
        """Leave no process behind."""
        self.pipe.close()
        if self.failure is None:
            self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()
        self.process.close()


def _receive_all(ranks, limit):
    """Wait for all ranks, for as long as they may take."""
    until = time.monotonic() + limit
    while running := [rank for rank in ranks if not rank.is_done]:
        ready = wait([rank.pipe for rank in running], max(0.0, until - time.monotonic()))
        for rank in running:
            if rank.pipe in ready:
                rank.receive()
            elif not ready:
                rank.give_up()
        if any(rank.failure for rank in ranks):
            # The rest may wait for it forever.
            until = min(until, time.monotonic() + GRACE)


def _be(number, world_size, folder, call, pipe, limit):
    """Be a rank, in a process that was just forked."""
    # Collections need not look at what the server imported, which would copy its memory.
    gc.freeze()
    log = os.open(folder / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
        stream.reconfigure(line_buffering=True)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    # Where nobody is left who would kill it.
    faulthandler.dump_traceback_later(limit + 2 * PATIENCE, exit=True)
    # What a launcher tells Lightning.
    os.environ.update(NODE_RANK="0", LOCAL_RANK=str(number), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        function, arguments = pickle.loads(call)
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=number, world_size=world_size)
        answer = pickle.dumps((function(*arguments), None))
    except BaseException:
        answer = pickle.dumps((None, f"raised\n{traceback.format_exc()}"))
    pipe.send_bytes(answer)
    with suppress(EOFError, ConnectionError):
        # The others may still need this process, until the test has heard of all.
        pipe.recv_bytes()
