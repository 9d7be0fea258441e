"""A network, its optimizers, and training it in one process or on one of two ranks."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import selective_optim
from tests.support.nets import TokenNet

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Measured: under gloo the FSDP2 of torch 2.7 adds gradients up and does not average.
FSDP2_DIVISOR = 1 if torch.__version__.startswith("2.7.") else 2


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
    return TokenNet()


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
    """Map names, less those of wrappers, to values, gathered where they are sharded."""
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): whole
        for name, param in model.named_parameters()
        for whole in [_whole(param).detach().clone()]
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


def names_that_decay(optimizer):
    """List the names of the parameters whose effective decay is not zero."""
    rows = optimizer.decay_report().rows
    return sorted(row.name for row in rows if row.weight_decay)
