"""What is compared: the bare kernel, torch in four ways, and this library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import selective_optim
from benchmarks.step.bare import BareKernel
from benchmarks.step.workload import Workload

BARE, ALONE = "bare kernel", "bare, small on one"
SMALL = 4096  # elements that a thread steps before a second one has come
FUSED, FOREACH, DEFAULT = "torch fused", "torch foreach", "torch default"
COMPILED = "torch compiled"
OURS, ONE_GROUP, PLAIN = "ours", "ours, one group", "ours, plain tensors"
TORCH = (FUSED, FOREACH, DEFAULT, COMPILED)
ARMS = (BARE, ALONE, *TORCH, OURS, ONE_GROUP, PLAIN)

CLASSES = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}
SETTINGS: dict[str, dict[str, float]] = {
    "adamw": {"lr": 1e-3, "weight_decay": 0.1},
    "adam": {"lr": 1e-3, "weight_decay": 1e-4},
    "sgd": {"lr": 1e-3, "weight_decay": 1e-4, "momentum": 0.9},
}
CHOICES: dict[str, dict[str, bool]] = {
    FUSED: {"fused": True},
    FOREACH: {"foreach": True},
    DEFAULT: {},
}


class Arm(NamedTuple):
    """One way to step a workload; ``prepare`` runs before each step, untimed."""

    name: str
    step: Callable[[], object]
    prepare: Callable[[], None]


def groups_of(load: Workload, optimizer: str) -> list[dict[str, Any]]:
    """Return the groups of a user who leaves the decay to a policy."""
    base = SETTINGS[optimizer]["lr"]
    return [
        {"params": params, "lr": load.rate(index, base)}
        for index, params in enumerate(load.groups)
    ]


def hand_split(load: Workload, optimizer: str) -> list[dict[str, Any]]:
    """Return every group twice: what decays, and what is exempt."""
    split = []
    for group in groups_of(load, optimizer):
        decayed = [param for param in group["params"] if param.ndim >= 2]
        exempt = [param for param in group["params"] if param.ndim < 2]
        split += [
            {**group, "params": decayed},
            {**group, "params": exempt, "weight_decay": 0.0},
        ]
    return [group for group in split if group["params"]]


def build_torch(load: Workload, optimizer: str, **choice: bool) -> Any:
    make = getattr(torch.optim, CLASSES[optimizer])
    own = {**SETTINGS[optimizer], **choice}
    return _scaled(make(hand_split(load, optimizer), **own), load)


def build_ours(
    load: Workload, optimizer: str, groups: Any = None, **choice: bool
) -> Any:
    make = getattr(selective_optim, CLASSES[optimizer])
    groups = groups_of(load, optimizer) if groups is None else groups
    own = {**SETTINGS[optimizer], **choice, "wd_policy": "matrices"}
    return _scaled(make(groups, **own), load)


def _scaled(optimizer: Any, load: Workload) -> Any:
    """Hand over what a ``GradScaler`` does, where the case says so."""
    vars(optimizer).update(load.scaling())
    return optimizer


def _arm(name: str, load: Workload, step: Callable[[], object]) -> Arm:
    return Arm(name, step, load.refresh)


def _bare_arm(name: str, load: Workload, optimizer: str, alone: int = 0) -> Arm:
    groups = hand_split(load, optimizer)
    own = {"alone": alone, **load.scaling()}
    kernel = BareKernel(groups, optimizer, SETTINGS[optimizer], **own)

    def prepare() -> None:
        load.refresh()
        kernel.fetch()

    return Arm(name, kernel.step, prepare)


def make_arms(
    load: Workload, plain: Workload | None, optimizer: str, compiled: bool
) -> list[Arm]:
    """Build every arm that makes sense for a case.

    Args:
        load: The tensors of the case.
        plain: For a sharded case, the same tensors unsharded.
        optimizer: A key of ``CLASSES``.
        compiled: Whether to compile torch's step, which takes minutes.
    """
    arms = [_bare_arm(BARE, load, optimizer)]
    choices = dict(CHOICES)
    if load.params[0].is_cpu:
        arms.append(_bare_arm(ALONE, load, optimizer, SMALL))
    else:
        del choices[FOREACH]  # which torch's default is there
    for name, choice in choices.items():
        arms.append(_arm(name, load, build_torch(load, optimizer, **choice).step))
    if compiled and load.case.compiles:
        step = build_torch(load, optimizer).step
        arms.append(_arm(COMPILED, load, torch.compile(step)))
    arms.append(_arm(OURS, load, build_ours(load, optimizer).step))
    if len(load.groups) > 1:
        one = build_ours(load, optimizer, load.params)
        arms.append(_arm(ONE_GROUP, load, one.step))
    if plain is not None:
        arms.append(_arm(PLAIN, plain, build_ours(plain, optimizer).step))
    return arms
