"""Two real processes on 127.0.0.1 for the tests of distributed training.

The processes are forked from a server that has imported torch once, and serve all
tests of a module: a pair costs half a second, where two imports take five.
"""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import traceback
import warnings
from datetime import timedelta
from importlib.util import find_spec
from multiprocessing.connection import wait
from time import monotonic

import pytest
import torch
import torch.distributed as dist

# For tests in which torch gathers objects from the ranks.
gathers_objects = pytest.mark.skipif(
    find_spec("numpy") is None, reason="torch gathers objects by way of numpy"
)
SECONDS = 60  # far above what a test needs: a hang ends, a busy machine does not fail
PRELOADED = [
    *("pytest", "torch._dynamo"),
    *("torch.distributed.fsdp", "torch.distributed.tensor"),
]


class RankError(AssertionError):
    """What a rank raised, with its traceback as text."""


class Ranks:
    """A gloo group of real processes; call it to run a function on every rank.

    A call that fails ends the processes, and the next call starts new ones.

    Example:
        >>> with Ranks() as ranks:
        ...     ranks(divmod, 7)  # divmod(rank, 7)
        [(0, 0), (0, 1)]
    """

    def __init__(self, world_size=2):
        self.world_size = world_size
        self._processes, self._pipes = [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def __call__(self, function, *args):
        """Return what ``function(rank, *args)`` returned, in the order of the ranks.

        Raises:
            RankError: A rank raised, died, or took too long.
        """
        if not self._pipes:
            self._start()
        call = pickle.dumps((function, args))
        try:
            for pipe in self._pipes:
                pipe.send_bytes(call)
            return self._collect()
        except BaseException:
            self.__exit__()
            raise

    def _start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        # The store takes a free port and keeps it: nobody else can, in between.
        self._store = dist.TCPStore("127.0.0.1", 0, wait_for_workers=False,
                                    is_master=True)  # fmt: skip
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            place = (rank, self.world_size, self._store.port)
            process = context.Process(target=_serve, args=(theirs, place), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _collect(self):
        """Wait for the answers; the first bad one ends the waiting for the others."""
        answers, deadline = {}, monotonic() + SECONDS
        while len(answers) < self.world_size:
            waiting = [pipe for pipe in self._pipes if pipe not in answers]
            ready = wait(waiting, timeout=max(0, deadline - monotonic()))
            if not ready:
                late = ", ".join(str(self._pipes.index(pipe)) for pipe in waiting)
                raise RankError(f"no answer of rank {late} within {SECONDS} s")
            for pipe in ready:
                answers[pipe] = _answer(pipe, self._pipes.index(pipe))
        return [answers[pipe] for pipe in self._pipes]


def _answer(pipe, rank):
    try:
        raised, value = pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        raise RankError(f"rank {rank} ended without an answer") from None
    if raised:
        raise RankError(f"rank {rank} raised\n{value}")
    return value


def _serve(pipe, place):
    """Join the group and answer calls until the pipe's other end is gone."""
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            os._exit(0)  # no teardown: it could wait for a rank that has failed
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
        try:
            if not dist.is_initialized():
                _join(*place)
            function, args = pickle.loads(call)
            answer = pickle.dumps((False, function(place[0], *args)))
            dist.barrier()  # nobody goes on while another still talks to it
        except BaseException:
            answer = pickle.dumps((True, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(answer)


def _join(rank, world_size, port):
    # What the library says about decay is an error here as in every other test.
    warnings.filterwarnings("error", message="(?s).*(weight.decay|wd_policy)")
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    place = {"rank": rank, "world_size": world_size}
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", store=store, timeout=timeout, **place)
