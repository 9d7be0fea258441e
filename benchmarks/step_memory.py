"""Memory that a step takes beyond what was there before, at its peak."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# torch's profiler reports its own starting and stopping on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(accumulate((e["args"]["Bytes"] for e in changes), initial=0))
