"""Results: how a case is run, what is saved of it, and on which machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch

from benchmarks.step.arms import Arm, make_arms
from benchmarks.step.cases import Case
from benchmarks.step.measure import (
    Clock,
    busy_processes,
    clock_for,
    copy_rate,
    interleave,
    peak_extra,
    spread,
    warm_up,
)
from benchmarks.step.once import build_times, first_steps, import_time
from benchmarks.step.workload import Workload, one_process_mesh

FOLDER = Path(__file__).parents[1] / "results"
# Tensors of the parameter's size that a fused step reads and writes per element.
PASSES = {"adamw": 7, "adam": 7, "sgd": 5}


class Effort(NamedTuple):
    """How long a run measures."""

    rounds: int
    seconds: float  # per visit of an arm
    repeats: int  # of what is paid once
    copied: int  # elements


# On a busy machine a step of the slowest arm takes seconds.
BUSY_ROUNDS = 12
FULL = Effort(rounds=30, seconds=0.15, repeats=20, copied=1 << 28)
QUICK = Effort(rounds=4, seconds=0.03, repeats=3, copied=1 << 24)


@contextmanager
def workloads(
    case: Case, device: torch.device
) -> Iterator[tuple[Workload, Workload | None]]:
    """Make the tensors of a case, and for a sharded one its mesh and plain ones."""
    with one_process_mesh(device) if case.sharded else nullcontext() as mesh:
        load = Workload(case, device, mesh)
        yield load, Workload(case, device) if case.sharded else None


def run_case(
    case: Case, optimizer: str, device: torch.device, effort: Effort, compiled: bool
) -> dict[str, Any]:
    """Measure one case with one optimizer."""
    clock = clock_for(device)
    with workloads(case, device) as (load, plain):
        arms = make_arms(load, plain, optimizer, compiled)
        able, errors = warm_up(arms, clock)
        with busy_processes(os.cpu_count() or 1) if case.busy else nullcontext():
            rounds = min(BUSY_ROUNDS, effort.rounds) if case.busy else effort.rounds
            times = interleave(able, clock, rounds, effort.seconds)
        extra = {arm.name: _extra(arm, device) for arm in able}
        first = first_steps(load, optimizer, clock, max(2, effort.repeats // 4))
    return {
        "case": case.name,
        "optimizer": optimizer,
        "tensors": len(case.shapes),
        "elements": case.elements,
        "groups": len(case.groups),
        "arms": {
            name: {
                "ms": spread([ms for visit in rounds for ms in visit])._asdict(),
                "mean_ms": round(fmean(ms for visit in rounds for ms in visit), 5),
                "steps": sum(map(len, rounds)),
                "round_ms": [round(median(visit), 5) for visit in rounds],
                "peak_extra_bytes": extra[name],
            }
            for name, rounds in times.items()
        },
        "errors": errors,
        "first_step_ms": {name: value._asdict() for name, value in first.items()},
        "step_bytes": step_bytes(case, optimizer),
    }


def step_bytes(case: Case, optimizer: str) -> int:
    """Count the bytes that a fused step reads and writes."""
    return case.dtype.itemsize * PASSES[optimizer] * case.elements


def _extra(arm: Arm, device: torch.device) -> int:
    arm.prepare()
    return peak_extra(device, arm.step)


def run_once(device: torch.device, clock: Clock, effort: Effort) -> dict[str, Any]:
    """Measure what no case has a part in.

    On a GPU the copy alone: the rest is the host's, and importing torch several times
    over takes half a minute of what a GPU is lent for.
    """
    copied = {"copy_gb_per_s": copy_rate(device, clock, effort.copied)}
    if device.type != "cpu":
        return copied
    return {
        "build_ms": {n: s._asdict() for n, s in build_times(effort.repeats).items()},
        "import_ms": import_time(max(3, effort.repeats // 4))._asdict(),
        **copied,
    }


def describe_run(device: torch.device, quick: bool) -> dict[str, Any]:
    """Record the machine and the versions."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "quick": quick,
    }


def device_name(device: torch.device) -> str:
    if device.type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return models[0] if models else platform.machine()


def _commit() -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(FOLDER.parent), *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        edited = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("-edited" if edited else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def default_path(run: dict[str, Any]) -> Path:
    name = run["device"] if run["device"] == "cpu" else run["device_name"]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    release = run["torch"].split("+")[0]
    return FOLDER / f"{slug}_torch{release}_{run['date']}.json"


def save(results: dict[str, Any], path: Path) -> None:
    """Replace the file at once: whoever is killed meanwhile leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}")
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(path)


def load(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text())
    return results
