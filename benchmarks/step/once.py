"""What is paid once: importing, building an optimizer, and its first step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import selective_optim
from benchmarks.step.arms import FUSED, OURS, build_ours, build_torch
from benchmarks.step.measure import Clock, HostClock, Spread, spread
from benchmarks.step.workload import Workload

IMPORT = (
    "import time, torch; start = time.perf_counter(); import selective_optim; "
    "print((time.perf_counter() - start) * 1e3)"
)


def model_of_1000() -> nn.Module:
    pair = (m for _ in range(250) for m in (nn.Linear(4, 4), nn.LayerNorm(4)))
    return nn.Sequential(*pair)


def split_by_hand(model: nn.Module) -> list[dict[str, Any]]:
    """Split as most projects do: walk the modules, look at types and names."""
    decayed, exempt = [], []
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            spared = isinstance(module, nn.LayerNorm) or name == "bias"
            (exempt if spared else decayed).append(param)
    return [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]


def build_times(repeats: int) -> dict[str, Spread]:
    """Time the construction from a module with 1,000 parameters, in turns."""
    model = model_of_1000()
    builds: dict[str, Callable[[], object]] = {
        "torch, no policy": lambda: torch.optim.AdamW(model.parameters()),
        "torch, split by hand": lambda: torch.optim.AdamW(split_by_hand(model)),
        OURS: lambda: selective_optim.AdamW(
            model.parameters(), wd_policy="no_bias_norm"
        ),
    }
    clock = HostClock()
    times: dict[str, list[float]] = {name: [] for name in builds}
    for _ in range(repeats):
        for name, build in builds.items():
            times[name].append(clock(build))
    return {name: spread(values[1:]) for name, values in times.items()}


def import_time(repeats: int) -> Spread:
    """Time the import in fresh processes that have imported torch.

    The first one, not counted, leaves bytecode for the others, as installing does.
    """
    command = [sys.executable, "-c", IMPORT]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    outputs = [
        subprocess.run(
            command, env=env, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(repeats + 1)
    ]
    return spread([float(output) for output in outputs[1:]])


def first_steps(
    load: Workload, optimizer: str, clock: Clock, repeats: int
) -> dict[str, Spread]:
    """Time the step that makes the state, on optimizers built for it in turns."""
    builds: dict[str, Callable[[], Any]] = {
        FUSED: lambda: build_torch(load, optimizer, fused=True),
        OURS: lambda: build_ours(load, optimizer),
    }
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, build in builds.items():
            try:
                times.setdefault(name, []).append(_first_step(load, build, clock))
            except Exception:  # the arm cannot run here; the warm-up says why
                continue
    return {name: spread(values) for name, values in times.items() if values}


def _first_step(load: Workload, build: Callable[[], Any], clock: Clock) -> float:
    step = build().step
    load.refresh()
    return clock(step)
