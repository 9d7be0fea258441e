"""Measuring: clocks, arms timed in turns, memory at its peak, medians and spreads."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.step.arms import Arm

# torch's profiler reports its own starting and stopping on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class Spread(NamedTuple):
    """A median and the values that a tenth of the samples lie below and above."""

    median: float
    p10: float
    p90: float


def quantile(values: Sequence[float], part: float) -> float:
    """Interpolate between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), quantile(values, 0.1), quantile(values, 0.9))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Compare two arms round by round: what disturbs one round disturbs both."""
    return spread([n / d for n, d in zip(numerator, denominator, strict=True)])


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep cores busy; nothing is left behind, also where the body raises."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Clock(Protocol):
    """Times a call in milliseconds."""

    def __call__(self, call: Callable[[], object]) -> float:
        """Run the call once."""


class HostClock:
    """Wall clock, for devices on which a call has finished when it returns."""

    def __call__(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3


class EventClock:
    """Device events around a call, the device idle before and after it.

    An event on an idle device is recorded at once, so the time includes what
    Python needs to launch the kernels.

    Args:
        accelerator: ``torch.cuda``, or a module like it.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __call__(self, call: Callable[[], object]) -> float:
        start, end = (self._accelerator.Event(enable_timing=True) for _ in range(2))
        self._accelerator.synchronize()
        start.record()
        call()
        end.record()
        self._accelerator.synchronize()
        return float(start.elapsed_time(end))


def clock_for(device: torch.device) -> Clock:
    if device.type == "cpu":
        return HostClock()
    return EventClock(torch.get_device_module(device))


def timed(arm: Arm, clock: Clock) -> float:
    arm.prepare()
    return clock(arm.step)


def warm_up(arms: Sequence[Arm], clock: Clock) -> tuple[list[Arm], dict[str, str]]:
    """Step every arm until its state exists; tell which cannot run, and why."""
    able, errors = [], {}
    for arm in arms:
        try:
            for _ in range(3):
                timed(arm, clock)
        except Exception as error:
            errors[arm.name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            able.append(arm)
    return able, errors


def visit(arm: Arm, clock: Clock, steps: int) -> list[float]:
    """Time steps in a row, after one that is not counted: others ran in between."""
    timed(arm, clock)
    return [timed(arm, clock) for _ in range(steps)]


def steps_within(arm: Arm, clock: Clock, seconds: float) -> int:
    """Count the steps, at least 2 and at most 20, that a visit has time for."""
    start = time.perf_counter()
    timed(arm, clock)
    return int(min(20, max(2, seconds / (time.perf_counter() - start))))


@contextmanager
def collecting_by_hand() -> Iterator[None]:
    """Collect garbage now, and then only where the block does."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def in_turn(arms: Sequence[Arm], turn: int) -> Sequence[Arm]:
    """Put the arms into the order of a round: each round begins with another."""
    first = turn % len(arms)
    return (*arms[first:], *arms[:first])


def interleave(
    arms: Sequence[Arm], clock: Clock, rounds: int, seconds: float
) -> dict[str, list[list[float]]]:
    """Visit every arm once per round, each round beginning with another.

    In turns, so that a busy machine disturbs all alike.

    Returns:
        Milliseconds by arm, round and step.
    """
    steps = {arm.name: steps_within(arm, clock, seconds) for arm in arms}
    times: dict[str, list[list[float]]] = {arm.name: [] for arm in arms}
    with collecting_by_hand():
        for turn in range(rounds):
            for arm in in_turn(arms, turn):
                times[arm.name].append(visit(arm, clock, steps[arm.name]))
            gc.collect()
    return times


def copy_rate(device: torch.device, clock: Clock, elements: int) -> float:
    """Measure the bandwidth of a copy, bytes read and written, in GB per second."""
    source = torch.rand(elements, device=device)  # zeros may be copied faster
    target = torch.ones_like(source)
    # Several at a time where launching one is a part of its time.
    many = 1 if device.type == "cpu" else 8
    times = [
        clock(lambda: [target.copy_(source) for _ in range(many)]) for _ in range(21)
    ]
    return many * 2 * source.nbytes / median(times) / 1e6


def peak_extra(device: torch.device, call: Callable[[], object]) -> int:
    """Return the bytes that a call allocates at its peak, kept or not."""
    if device.type == "cpu":
        return _peak_on_cpu(call)
    return peak_on_accelerator(torch.get_device_module(device), call)


def peak_on_accelerator(accelerator: Any, call: Callable[[], object]) -> int:
    accelerator.synchronize()
    accelerator.reset_peak_memory_stats()
    before = accelerator.memory_allocated()
    call()
    accelerator.synchronize()
    return int(accelerator.max_memory_allocated() - before)


def _peak_on_cpu(call: Callable[[], object]) -> int:
    """Add up what torch's allocator reports; it sees inside kernels too."""
    events = trace_of(call, activities=[ProfilerActivity.CPU], profile_memory=True)
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(accumulate((e["args"]["Bytes"] for e in changes), initial=0))


def trace_of(call: Callable[[], object], **profiled: Any) -> list[dict[str, Any]]:
    """Run a call under torch's profiler and return the events of its trace."""
    # They accumulate, though there is one cycle: torch 2.11 warns where they do not.
    with profile(**profiled, acc_events=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events
