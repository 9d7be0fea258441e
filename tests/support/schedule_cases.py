"""Optimizers and schedulers that the tests of weight decay schedules run over."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers

import selective_optim

OPTIMIZERS = {
    "torch.AdamW": torch.optim.AdamW,
    "torch.SGD": torch.optim.SGD,
    "AdamW": selective_optim.AdamW,
    "SGD": selective_optim.SGD,
}
optimizers = pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def one_hundredth(epoch: int) -> float:
    return 1 + epoch / 100


def halves(epoch: int) -> float:
    return 0.5**epoch


def sequential(optimizer: Any) -> Any:
    warm_up = torch_schedulers.LinearLR(optimizer, 0.1, total_iters=4)
    cosine = torch_schedulers.CosineAnnealingLR(optimizer, 6, eta_min=0.4)
    return torch_schedulers.SequentialLR(optimizer, [warm_up, cosine], [4])


def chained(optimizer: Any) -> Any:
    warm_up = torch_schedulers.LinearLR(optimizer, 0.1, total_iters=4)
    decay = torch_schedulers.ExponentialLR(optimizer, 0.9)
    return torch_schedulers.ChainedScheduler([warm_up, decay])


def one_cycle(optimizer: Any) -> Any:
    return torch_schedulers.OneCycleLR(
        optimizer, [0.3, 0.2], total_steps=12, cycle_momentum=False
    )


def cyclic(optimizer: Any) -> Any:
    return torch_schedulers.CyclicLR(
        optimizer, 0.01, 0.2, step_size_up=3, cycle_momentum=False
    )


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: torch_schedulers.LambdaLR(o, [one_hundredth, halves]),
    "multiplicative": lambda o: torch_schedulers.MultiplicativeLR(o, one_hundredth),
    "step": lambda o: torch_schedulers.StepLR(o, 3),
    "multistep": lambda o: torch_schedulers.MultiStepLR(o, [2, 5]),
    "constant": lambda o: torch_schedulers.ConstantLR(o, 0.25, 4),
    "linear": lambda o: torch_schedulers.LinearLR(o, 0.1, total_iters=5),
    "exponential": lambda o: torch_schedulers.ExponentialLR(o, 0.8),
    "polynomial": lambda o: torch_schedulers.PolynomialLR(o, 7, 2.0),
    "cosine": lambda o: torch_schedulers.CosineAnnealingLR(o, 8, eta_min=0.4),
    "restarts": lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, 3),
    "sequential": sequential,
    "chained": chained,
    "one cycle": one_cycle,
    "cyclic": cyclic,
}
schedules = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES.keys())


def two_groups(kind: Any, lr: float = 0.1, weight_decay: float = 0.04) -> Any:
    first = nn.Parameter(torch.tensor([1.0, -2.0]))
    second = nn.Parameter(torch.tensor([3.0]))
    first.grad, second.grad = torch.zeros(2), torch.zeros(1)
    half = {"params": [second], "lr": lr / 2, "weight_decay": weight_decay / 2}
    return kind([{"params": [first]}, half], lr=lr, weight_decay=weight_decay)


def values(optimizer: Any, key: str) -> list[float]:
    return [group[key] for group in optimizer.param_groups]


def run(optimizer: Any, scheduler: Any, steps: int, key: str) -> list[list[float]]:
    """Step both and list what the groups say after every step."""
    history = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        history.append(values(optimizer, key))
    return history
