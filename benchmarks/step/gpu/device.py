"""What is asked of a GPU: time, a nap, a graph, launches; and a stand-in for one."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity

from benchmarks.step.measure import peak_on_accelerator, trace_of

Call = Callable[[], object]
WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # of a trace, what the device does
NAP = 20_000_000  # cycles, to learn how long one takes


class Device(Protocol):
    """What the clock and the arms need."""

    def event(self) -> Any:
        """Make an event that takes the time when the device comes to it."""

    def synchronize(self) -> None:
        """Wait until the device has done all."""

    def nap(self, ms: float) -> None:
        """Keep the device busy; the host goes on."""

    def captured(self, step: Call) -> Call:
        """Return what replays a step from a graph, after running it a few times."""

    def launches(self, step: Call) -> int | None:
        """Count what a step has the device do, if that can be seen."""

    def extra_bytes(self, step: Call) -> int:
        """Measure the memory that a step takes for a while."""


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        self._cycles = 0.0  # in a millisecond

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def nap(self, ms: float) -> None:
        self._cycles = self._cycles or self._measure_cycles()
        torch.cuda._sleep(int(ms * self._cycles))

    def _measure_cycles(self) -> float:
        times = []
        for _ in range(3):  # the first wakes the device
            start, end = self.event(), self.event()
            start.record()
            torch.cuda._sleep(NAP)
            end.record()
            self.synchronize()
            times.append(start.elapsed_time(end))
        return NAP / min(times)

    def captured(self, step: Call) -> Call:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return partial(_replay, graph, step)

    def launches(self, step: Call) -> int | None:
        def whole() -> None:
            step()
            self.synchronize()

        both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        kinds = [event.get("cat") for event in trace_of(whole, activities=both)]
        return sum(map(kinds.count, WORK)) or None  # none where it may not look

    def extra_bytes(self, step: Call) -> int:
        return peak_on_accelerator(torch.cuda, step)


def _replay(graph: Any, step: Call) -> None:
    """Replay; ``step`` is at hand to keep the tensors alive that the graph writes."""
    graph.replay()


class StandIn:
    """Answers on a CPU what a GPU would, so that a measurement can be rehearsed."""

    def event(self) -> Any:
        return _HostEvent()

    def synchronize(self) -> None:
        """Nothing is under way."""

    def nap(self, ms: float) -> None:
        """There is nothing to keep busy."""

    def captured(self, step: Call) -> Call:
        step()
        return step

    def launches(self, step: Call) -> int | None:
        return None

    def extra_bytes(self, step: Call) -> int:
        return 0


class _HostEvent:
    def record(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return False  # as where the device is still busy with the nap

    def elapsed_time(self, end: _HostEvent) -> float:
        return (end.time - self.time) * 1e3


def device_for(device: torch.device) -> Device:
    return Cuda() if device.type == "cuda" else StandIn()
