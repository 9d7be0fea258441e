"""Host time and device time of a step, measured where they do not mix.

A kernel that naps is launched first. While it runs the host launches some steps,
which it does at its own pace; then the device runs them back to back, without
waiting for the host.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.step.arms import Arm
from benchmarks.step.gpu.device import Device
from benchmarks.step.measure import collecting_by_hand, in_turn

# CUDA queues some 1,000 launches, then the host waits: fewer steps are tried in turn.
MOST_STEPS = 20
FIRST_NAP, LONGEST_NAP = 4.0, 400.0  # milliseconds
LONGEST_VISIT = 60.0  # milliseconds, as far as one step is shorter
SPARE = 2.0  # by how much a nap is longer than launching took before
TRIES = 3


@dataclass
class Times:
    """Milliseconds of an arm's steps, one entry per round.

    Args:
        steps: How many are launched during a nap; 0 where not even one can be, as it
            waits for the device or makes more launches than fit into the queue.
        nap: For how long the device is kept busy meanwhile.
        host: For the host to launch a step.
        device: For the device to run it.
        idle: From an idle device to an idle device: launching and running, as far
            as they do not overlap.
    """

    steps: int = 0
    nap: float = 0.0
    host: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)


def from_idle(device: Device, arm: Arm) -> float:
    """Time a step from launch to end."""
    start, end = device.event(), device.event()
    arm.prepare()
    device.synchronize()
    start.record()
    arm.step()
    end.record()
    device.synchronize()
    return float(start.elapsed_time(end))


def launched(
    device: Device, arm: Arm, steps: int, nap: float
) -> tuple[float, float | None]:
    """Launch some steps during a nap.

    Returns:
        Milliseconds that the host took for one, and the device; ``None`` if it woke
        before the last was launched, and may have waited.
    """
    start, end = device.event(), device.event()
    host = 0.0
    device.synchronize()
    if nap:
        device.nap(nap)
    start.record()
    for _ in range(steps):
        arm.prepare()  # without work for the device
        began = time.perf_counter()
        arm.step()
        host += time.perf_counter() - began
    ahead = bool(nap) and not start.query()
    end.record()
    device.synchronize()
    ran = float(start.elapsed_time(end)) / steps
    return host * 1e3 / steps, ran if ahead else None


def learn(device: Device, arm: Arm) -> Times:
    """Find out how many steps can be launched during a nap, and how long it must be.

    Launches are not counted for it: torch's profiler, once it ran, may make all that
    follow slower, and a replayed graph is one launch of many kernels.
    """
    brief = max(1, int(LONGEST_VISIT / from_idle(device, arm)))
    most = min(MOST_STEPS, brief)
    for steps in dict.fromkeys((most, max(1, most // 4), 1)):
        nap = FIRST_NAP
        for _ in range(TRIES):
            began = time.perf_counter()
            _, ran = launched(device, arm, steps, nap)
            if ran is not None:
                return Times(steps, nap)
            took = (time.perf_counter() - began) * 1e3
            nap = min(LONGEST_NAP, SPARE * took)
    return Times()


def visit(device: Device, arm: Arm, times: Times) -> None:
    """Measure an arm once in every way, after a step: others ran in between."""
    times.idle.append(from_idle(device, arm))
    for _ in range(TRIES if times.steps else 0):
        host, ran = launched(device, arm, times.steps, times.nap)
        if ran is not None:
            times.host.append(host)
            times.device.append(ran)
            return
        times.nap = min(LONGEST_NAP, SPARE * times.nap)
    times.host.append(launched(device, arm, 1, 0.0)[0])


def measure(
    device: Device, arms: Sequence[Arm], rounds: int, limit: float
) -> dict[str, Times]:
    """Visit every arm once per round, each round beginning with another.

    Args:
        device: Where they run.
        arms: What is compared; each has stepped before.
        rounds: How many, if there is time.
        limit: Seconds after which no other round begins; the first always does.
    """
    deadline = time.monotonic() + limit
    all_times = {arm.name: learn(device, arm) for arm in arms}
    with collecting_by_hand():
        for turn in range(rounds):
            for arm in in_turn(arms, turn):
                visit(device, arm, all_times[arm.name])
            if time.monotonic() > deadline:
                break
            gc.collect()
    return all_times
