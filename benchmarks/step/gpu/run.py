"""A case on a GPU: its arms, some replayed from a CUDA graph, and what is saved."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.step.arms import (
    DEFAULT,
    FUSED,
    OURS,
    Arm,
    build_ours,
    build_torch,
    make_arms,
)
from benchmarks.step.cases import LAYERS, Case
from benchmarks.step.gpu.clock import Times, measure
from benchmarks.step.gpu.device import Device, device_for
from benchmarks.step.measure import clock_for, spread, warm_up
from benchmarks.step.once import first_steps
from benchmarks.step.results import Effort, step_bytes, workloads
from benchmarks.step.workload import Workload

FUSED_GRAPH, OURS_GRAPH = f"{FUSED}, graph", f"{OURS}, graph"
SCHEDULED = f"{OURS}, schedule"
# What is measured on a GPU where nobody chooses.
CASES = (
    *("tiny", "tiny_scaled", "tiny_layers", "tiny_layers_tensors"),
    *("tiny_groups", "tiny_groups_lr", "dtensor"),
    *("resnet50", "vit_l", "vit_l_bf16", "vit_l_layers", "decoder"),
)


def run_case(
    case: Case,
    optimizer: str,
    device: torch.device,
    effort: Effort,
    compiled: bool,
    limit: float,
    careful: bool = False,
) -> dict[str, Any]:
    """Measure one case with one optimizer, for about ``limit`` seconds.

    ``careful`` leaves out what a process may have ended of: graphs.
    """
    began = time.monotonic()
    gpu, clock = device_for(device), clock_for(device)
    with workloads(case, device) as (load, plain):
        able, errors = _able(load, plain, optimizer, gpu, compiled, careful)
        left = limit - (time.monotonic() - began)
        times = measure(gpu, able, effort.rounds, left)
        extra = {arm.name: _extra(gpu, arm) for arm in able}
        first = first_steps(load, optimizer, clock, max(2, effort.repeats // 4))
    moved = step_bytes(case, optimizer)
    return {
        "case": case.name,
        "optimizer": optimizer,
        "tensors": len(case.shapes),
        "elements": case.elements,
        "groups": len(case.groups),
        "arms": {n: _arm_record(t, moved, extra[n]) for n, t in times.items()},
        "errors": errors,
        "first_step_ms": {name: value._asdict() for name, value in first.items()},
        "step_bytes": moved,
        "seconds": round(time.monotonic() - began, 1),
    }


def count_launches(
    case: Case, optimizer: str, device: torch.device
) -> dict[str, int | None]:
    """Count what a step of each arm has the device do.

    Apart from all timing, and after it: torch's profiler stays attached to the device,
    and may make each launch slower.
    """
    gpu = device_for(device)
    with workloads(case, device) as (load, plain):
        able, _ = _able(load, plain, optimizer, gpu)
        counts: dict[str, int | None] = {}
        for arm in able:
            arm.prepare()
            counts[arm.name] = gpu.launches(arm.step)
    return counts


def _able(
    load: Workload,
    plain: Workload | None,
    optimizer: str,
    gpu: Device,
    compiled: bool = False,
    careful: bool = False,
) -> tuple[list[Arm], dict[str, str]]:
    """Make the arms and step them until they are warm; tell which cannot, and why."""
    case, clock = load.case, clock_for(load.params[0].device)
    arms = make_arms(load, plain, optimizer, compiled)
    arms += _scheduled(load, optimizer)
    able, errors = warm_up([arm for arm in arms if _makes_sense(arm, case)], clock)
    graphs = has_graphs(case) and not careful
    for name, build in _GRAPHS.items() if graphs else ():
        try:
            able.append(_replaying(name, build(load, optimizer), load, gpu))
        except Exception as error:  # of a capture; the other arms can still run
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return able, errors


def _makes_sense(arm: Arm, case: Case) -> bool:
    """Leave out torch's default under a scaler: it waits for the host to look."""
    return not (case.scaled and arm.name == DEFAULT)


def _build_fused(load: Workload, optimizer: str) -> Any:
    return build_torch(load, optimizer, fused=True, **_capturable(optimizer))


def _build_ours(load: Workload, optimizer: str) -> Any:
    return build_ours(load, optimizer, **_capturable(optimizer))


def _capturable(optimizer: str) -> dict[str, bool]:
    return {} if optimizer == "sgd" else {"capturable": True}


_GRAPHS = {FUSED_GRAPH: _build_fused, OURS_GRAPH: _build_ours}


# Elements of parameters beside whose gradients the moments of six optimizers fit.
MOST_FOR_GRAPHS = 1_000_000_000


def has_graphs(case: Case) -> bool:
    return case.elements < MOST_FOR_GRAPHS and not case.sharded


def _replaying(name: str, optimizer: Any, load: Workload, gpu: Device) -> Arm:
    load.refresh()  # the graph reads these gradients, whose memory all others view
    return Arm(name, gpu.captured(optimizer.step), lambda: None)


def _scheduled(load: Workload, optimizer: str) -> list[Arm]:
    """Make an arm whose rates change at every step, so that numbers are read anew."""
    if not load.case.own_lr or load.case.tensor_lr or len(load.groups) > LAYERS:
        return []
    return [_changing(SCHEDULED, load, build_ours(load, optimizer))]


def _changing(name: str, load: Workload, optimizer: Any) -> Arm:
    def prepare() -> None:
        load.refresh()
        for group in optimizer.param_groups:
            group["lr"] *= 0.999999

    return Arm(name, optimizer.step, prepare)


def _extra(gpu: Device, arm: Arm) -> int:
    arm.prepare()
    return gpu.extra_bytes(arm.step)


def _arm_record(times: Times, moved: int, extra: int) -> dict[str, Any]:
    """Sum up an arm; ``ms`` is the device's time, where it could be had."""
    record: dict[str, Any] = {
        "launches": None,  # counted when all is timed
        "host_ms": spread(times.host)._asdict(),
        "round_host_ms": _rounded(times.host),
        "idle_ms": spread(times.idle)._asdict(),
        "peak_extra_bytes": extra,
    }
    if len(times.device) == len(times.host):  # no round without
        ms = spread(times.device)
        record |= {
            "ms": ms._asdict(),
            "round_ms": _rounded(times.device),
            "gb_per_s": moved / ms.median / 1e6,
        }
    return record


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]
