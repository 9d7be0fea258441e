"""Clocks, and arms timed in turns so that a busy machine disturbs all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from benchmarks.step_arms import Arm


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


def interleave(
    arms: Sequence[Arm], clock: Clock, rounds: int, seconds: float
) -> dict[str, list[list[float]]]:
    """Visit every arm once per round, each round beginning with another.

    Returns:
        Milliseconds by arm, round and step.
    """
    steps = {arm.name: steps_within(arm, clock, seconds) for arm in arms}
    times: dict[str, list[list[float]]] = {arm.name: [] for arm in arms}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(arms)
            for arm in (*arms[first:], *arms[:first]):
                times[arm.name].append(visit(arm, clock, steps[arm.name]))
            gc.collect()
    finally:
        gc.enable()
    return times


def copy_rate(device: torch.device, clock: Clock, elements: int) -> float:
    """Measure the bandwidth of a copy, bytes read and written, in GB per second."""
    source = torch.zeros(elements, device=device)
    target = torch.ones_like(source)
    times = sorted(clock(lambda: target.copy_(source)) for _ in range(21))
    return 2 * source.nbytes / times[len(times) // 2] / 1e6
