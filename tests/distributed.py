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
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import selective_optim
from selective_optim.parameters import canonical_name

SECONDS = 60  # far above what a test needs: a hang ends, a busy machine does not fail
PRELOADED = ["pytest", "torch.distributed.fsdp", "torch.distributed.tensor"]


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


# A network in which shapes mislead: the norm's parameters are matrices, and the last
# weight has one row, so that sharding it leaves one rank with nothing.
class Net(nn.Module):
    """Reads three tokens, gives a number."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 7)
        self.norm = nn.LayerNorm((3, 7))
        self.last = nn.Linear(7, 1)

    def forward(self, tokens):
        hidden = torch.relu(self.first(self.embed(tokens)))
        return self.last(self.norm(hidden)).sum(dim=(1, 2))


DECAYED = ("embed.weight", "first.weight", "last.weight")  # by "no_bias_norm"
STEPS = range(5)


@dataclass(frozen=True)
class Setup:
    """An optimizer of ours, and torch's that computes the same on hand-split groups."""

    id: str
    name: str
    hyperparameters: dict[str, Any]
    ours: dict[str, Any]
    torchs: dict[str, Any]

    @property
    def on_shards(self):
        """Tolerances against whole tensors: none, but for a fused kernel.

        It rounds the last elements of a tensor, which no longer fill a vector
        register, otherwise than the rest, and shards end elsewhere.
        """
        return {} if self.ours else {"rtol": 1e-5, "atol": 1e-6}

    def make(self, params, wd_policy="no_bias_norm", **arguments):
        """Make the optimizer of ours."""
        arguments = {**self.hyperparameters, **self.ours, **arguments}
        optimizer = getattr(selective_optim, self.name)
        return optimizer(params, wd_policy=wd_policy, **arguments)

    def make_torchs(self, model, decayed=DECAYED):
        """Make torch's, with one group for the decayed and one for the exempt."""
        named = list(model.named_parameters())
        groups = [
            {"params": [p for name, p in named if name in decayed]},
            {
                "params": [p for name, p in named if name not in decayed],
                "weight_decay": 0.0,
            },
        ]
        optimizer = getattr(torch.optim, self.name)
        return optimizer(groups, **self.hyperparameters, **self.torchs)


_ADAM = {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.2}
_SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.2, "nesterov": True}
_LOOP = {"foreach": False, "fused": False}
SETUPS = [
    Setup("adamw", "AdamW", _ADAM, {}, {"fused": True}),
    Setup("adamw-for-loop", "AdamW", _ADAM, _LOOP, _LOOP),
    Setup("adam-amsgrad", "Adam", {**_ADAM, "amsgrad": True}, {}, {"fused": True}),
    Setup("sgd", "SGD", _SGD, {}, {"fused": True}),
    Setup("sgd-for-loop", "SGD", _SGD, _LOOP, _LOOP),
]


def make_net():
    """Make the network, with the same values in every process."""
    torch.manual_seed(0)
    return Net()


def loss_of(model, step, rank):
    """Compute the loss of one rank's share of a step's batch."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    tokens = torch.randint(0, 11, (4, 3), generator=generator)
    return (model(tokens) - 1).square().mean()


def train(model, optimizer, rank, steps=STEPS):
    """Train on this rank's share; the wrapper averages the gradients."""
    for step in steps:
        _schedule(optimizer, step)
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        optimizer.step()


def train_alone(model, optimizer, steps=STEPS, divisor=2):
    """Train in one process on the shares of both ranks, averaging as wrappers do."""
    params = list(model.parameters())
    for step in steps:
        _schedule(optimizer, step)
        shares = [
            torch.autograd.grad(loss_of(model, step, rank), params) for rank in range(2)
        ]
        for param, *grads in zip(params, *shares):
            param.grad = sum(grads) / divisor
        optimizer.step()


def _schedule(optimizer, step):
    for group in optimizer.param_groups:
        group["lr"] = 0.02 / (1 + step // 2)


def values_of(model):
    """Map canonical names to values, gathered where they are sharded."""
    return {
        canonical_name(name): _whole(param).detach().clone()
        for name, param in model.named_parameters()
    }


def _whole(param):
    return param.full_tensor() if isinstance(param, DTensor) else param


def reference(setup, divisor=2):
    """Train torch's optimizer in this process and return the network's values."""
    model = make_net()
    with one_thread():
        train_alone(model, setup.make_torchs(model), divisor=divisor)
    return values_of(model)


@contextmanager
def one_thread():
    """Compute with one thread, as the ranks do: more would sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def assert_same(actual, expected, rtol=0, atol=0):
    """Check that two mappings of tensors have the same keys and the same bits."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
