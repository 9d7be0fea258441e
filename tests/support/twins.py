"""Ours and torch's class split by hand, to which the same is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import selective_optim
from tests.support.compare import assert_same

SHAPES = [(4, 3), (3,), (2, 5), (5,)]
CLASSES = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
}
KINDS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False, "fused": False},
}
WD = 0.3


def make_params(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    """Make the same parameters at every call."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_grads(params: Sequence[torch.Tensor], step: int) -> None:
    """Give the same gradients to every list of like parameters."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        drawn = torch.randn(param.shape, generator=generator)
        param.grad = drawn.to(param.dtype)


def ours(name: str, kind: str, params: Sequence[Any], **arguments: Any) -> Any:
    """Make our optimizer: one group, of which the matrices decay."""
    chosen = {"weight_decay": WD, "wd_policy": "matrices", **KINDS[kind]}
    cls = getattr(selective_optim, name)
    return cls(params, **{**CLASSES[name], **chosen, **arguments})


def torchs(name: str, kind: str, params: Sequence[Any], **arguments: Any) -> Any:
    """Make torch's: two groups; fused where we choose fused."""
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": WD},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    chosen = KINDS[kind] or {"fused": True}
    cls = getattr(torch.optim, name)
    return cls(groups, **{**CLASSES[name], **chosen, **arguments})


def default_torchs(name: str, kind: str, params: Any, **arguments: Any) -> Any:
    """Make torch's; its default, the for-loop on a CPU, where ours is left open."""
    chosen = "for-loop" if kind == "automatic" else kind
    return torchs(name, chosen, params, **arguments)


def step(params: Sequence[torch.Tensor], optimizer: Any, number: int) -> None:
    """Set gradients and step."""
    set_grads(params, number)
    optimizer.step()


Edit = Callable[[Any, list[Any]], Any]


def both(name: str, kind: str, edit: Edit, steps: int = 3, **arguments: Any) -> None:
    """Step both, do the same to both, step on, and compare what is left."""
    left = []
    for make in (ours, torchs):
        params = make_params()
        optimizer = make(name, kind, params, **arguments)
        for number in range(2):
            step(params, optimizer, number)
        answer = edit(optimizer, params)
        for number in range(2, 2 + steps):
            step(params, optimizer, number)
        left.append((params, optimizer, answer))
    (mine, our_optimizer, here), (theirs, optimizer, there) = left
    assert here == there
    assert_twins(mine, theirs, our_optimizer, optimizer)


def assert_twins(mine: Any, theirs: Any, ours: Any, torchs: Any) -> None:
    """Compare the parameters, and the state of each."""
    assert_same(mine, theirs)
    states = [ours.state.get(param, {}) for param in mine]
    assert_same(states, [torchs.state.get(param, {}) for param in theirs])
