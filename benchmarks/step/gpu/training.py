"""Whole training steps: what a step's share of them leaves of any difference."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import selective_optim
from benchmarks.step.arms import CLASSES, DEFAULT, FUSED, OURS, SETTINGS
from benchmarks.step.gpu.device import Device
from benchmarks.step.measure import spread

CLASS_COUNT = 1000
NO_STEP = "no step"
STEPS, QUICK_STEPS = 4, 1  # between two events


class Training(NamedTuple):
    """A network and how many images a step sees."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    small: int  # where only to see that all runs


class ViT(nn.Module):
    """Vision transformer of torch's own layers, ViT-S/16 by default."""

    def __init__(self, width: int = 384, blocks: int = 12, size: int = 224) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 16, 16)
        self.positions = nn.Parameter(torch.randn(1, (size // 16) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                *(width, width // 64, 4 * width),
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASS_COUNT)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens.mean(1)))


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50()


TRAININGS = {
    "train_vit_s": Training("train_vit_s", ViT, batch=128, small=1),
    "train_resnet50": Training("train_resnet50", _resnet50, batch=128, small=1),
}


def trainings() -> list[Training]:
    """List what can be built here; ResNet-50 is torchvision's."""
    there = importlib.util.find_spec("torchvision") is not None
    return [t for t in TRAININGS.values() if there or t.build is not _resnet50]


def _optimizers(model: nn.Module, optimizer: str) -> dict[str, Any]:
    name, own = CLASSES[optimizer], SETTINGS[optimizer]
    split = [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    torchs = getattr(torch.optim, name)
    ours = getattr(selective_optim, name)
    return {
        DEFAULT: torchs(split, **own),
        FUSED: torchs(split, **own, fused=True),
        OURS: ours(model.parameters(), **own, wd_policy="matrices"),
    }


class _Loop:
    """Trains one model on the same images, stepped by whom it is told."""

    def __init__(self, training: Training, device: torch.device, batch: int) -> None:
        where = {"device": device}
        torch.manual_seed(0)
        self.model = training.build().to(device, memory_format=torch.channels_last)
        self._images = torch.randn(batch, 3, 224, 224, **where)
        self._labels = torch.randint(CLASS_COUNT, (batch,), **where)
        # Not on a CPU, where it takes minutes.
        on_gpu = device.type != "cpu"
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)

    def train(self, step: Callable[[], object]) -> None:
        with self._autocast:
            logits = self.model(self._images)
            loss = nn.functional.cross_entropy(logits, self._labels)
        loss.backward()
        step()
        self.model.zero_grad()


def _time(gpu: Device, train: Callable[[], object], steps: int) -> float:
    """Time steps back to back, as they come in training."""
    train()  # of others' caches
    start, end = gpu.event(), gpu.event()
    gpu.synchronize()
    start.record()
    for _ in range(steps):
        train()
    end.record()
    gpu.synchronize()
    return float(start.elapsed_time(end)) / steps


def run_training(
    training: Training,
    optimizer: str,
    device: torch.device,
    gpu: Device,
    rounds: int,
    limit: float,
    quick: bool,
) -> dict[str, Any]:
    """Time training steps in turns, for about ``limit`` seconds."""
    deadline = time.monotonic() + limit
    batch, steps = training.batch, STEPS
    if quick:
        batch, steps = training.small, QUICK_STEPS
    loop = _Loop(training, device, batch)
    arms = {n: o.step for n, o in _optimizers(loop.model, optimizer).items()}
    arms[NO_STEP] = lambda: None
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in _rounds(rounds, deadline):
        for name in _turned([*arms], turn):
            times[name].append(_time(gpu, partial(loop.train, arms[name]), steps))
    return {
        "case": training.name,
        "optimizer": optimizer,
        "batch": batch,
        "arms": {
            name: {"ms": spread(values)._asdict(), "round_ms": values}
            for name, values in times.items()
        },
    }


def _turned(names: list[str], turn: int) -> list[str]:
    first = turn % len(names)
    return names[first:] + names[:first]


def _rounds(most: int, deadline: float) -> Iterator[int]:
    for turn in range(most):
        yield turn
        if time.monotonic() > deadline:
            return
