"""One optimizer written in three ways, and what training with each came to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import selective_optim
from benchmarks.digits.networks import WEIGHT, build, kinds
from benchmarks.digits.training import Data, accuracy, snapshot, train

BACKBONE_LR, HEAD_LR = 3e-3, 6e-3
WEIGHT_DECAY = 0.8
HAND_SPLIT, SELECTIVE, ALL = "torch, hand-split", "selective_optim", "all decayed"
RECORD_EVERY = 5  # steps


def by_rate(model: nn.Module) -> list[dict[str, Any]]:
    """Make the two groups that differ in their learning rate: backbone and head."""
    head = list(model.head.parameters())
    inside = {id(param) for param in head}
    backbone = [param for param in model.parameters() if id(param) not in inside]
    return [
        {"params": backbone, "lr": BACKBONE_LR},
        {"params": head, "lr": HEAD_LR},
    ]


def hand_split(model: nn.Module) -> torch.optim.Optimizer:
    """Split each of the two groups by hand, as torch alone requires."""
    decayed = {id(param) for param in kinds(model)[WEIGHT]}
    groups = []
    for group in by_rate(model):
        for decays in (True, False):
            params = [p for p in group["params"] if (id(p) in decayed) is decays]
            decay = WEIGHT_DECAY if decays else 0.0
            groups.append({**group, "params": params, "weight_decay": decay})
    return torch.optim.AdamW(groups, fused=True)


def selective(model: nn.Module) -> torch.optim.Optimizer:
    """Keep one group per learning rate and say who decays."""
    return selective_optim.AdamW(
        by_rate(model),
        weight_decay=WEIGHT_DECAY,
        fused=True,
        wd_policy="no_bias_norm",
        model=model,
    )


def all_decayed(model: nn.Module) -> torch.optim.Optimizer:
    """Decay norms and biases too, as torch does when nothing is split."""
    return torch.optim.AdamW(by_rate(model), weight_decay=WEIGHT_DECAY, fused=True)


ARMS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    HAND_SPLIT: hand_split,
    SELECTIVE: selective,
    ALL: all_decayed,
}


@dataclass
class History:
    """Mean absolute value of each kind of parameter over training."""

    parameters: dict[str, list[Tensor]]
    steps: list[int] = field(default_factory=list)
    means: dict[str, list[Tensor]] = field(default_factory=dict)

    def record(self, step: int) -> None:
        """Note the means; they stay on the device, so that training does not wait."""
        self.steps.append(step)
        for kind, params in self.parameters.items():
            elements = torch.cat([param.detach().abs().flatten() for param in params])
            self.means.setdefault(kind, []).append(elements.mean())

    def curve(self, kind: str) -> list[float]:
        return torch.stack(self.means[kind]).tolist()


@dataclass(frozen=True)
class Result:
    """What one arm came to on one network."""

    network: str
    arm: str
    groups: int
    accuracy: float
    seconds: float
    history: History
    tensors: dict[str, Tensor]


def run(
    network: str,
    arm: str,
    data: Data,
    epochs: int,
    seed: int,
    on_step: Callable[[int], object],
) -> Result:
    """Train one network with the optimizer of one arm."""
    model = build(network, seed, data.images.device)
    optimizer = ARMS[arm](model)
    history = History(kinds(model))
    history.record(0)

    last_step = epochs * data.steps_per_epoch

    def after_step(step: int) -> None:
        if step % RECORD_EVERY == 0 or step == last_step:
            history.record(step)
        on_step(step)

    start = time.perf_counter()
    train(model, optimizer, data, epochs, after_step, seed=seed)
    right = accuracy(model, data)  # a number, so a GPU has finished
    seconds = time.perf_counter() - start
    groups = len(optimizer.param_groups)
    tensors = snapshot(model, optimizer)
    return Result(network, arm, groups, right, seconds, history, tensors)
