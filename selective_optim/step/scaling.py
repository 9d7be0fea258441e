"""What a ``GradScaler`` hands over, and a step under it: nothing waits for a device.

It lays the scale and whether infinity was found on an optimizer that takes them, which
ours does with ``fused=True`` alone (``torch/amp/grad_scaler.py``, 2.7 to 2.15). Kernels
unscale and skip by themselves; counters that have advanced fall back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scaling(NamedTuple):
    """What a ``GradScaler`` hands over, on one device."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


NO_SCALING = Scaling()


class Scalings:
    """What a ``GradScaler`` handed over, moved to each device once per step."""

    def __init__(self, given: Scaling) -> None:
        self._given = given
        self._moved: dict[torch.device, Scaling] = {}
        self.dropping = given.found_inf is not None  # whether a step may be dropped

    def on(self, device: torch.device) -> Scaling:
        """Return ``grad_scale`` and ``found_inf`` on a device."""
        if self._given == NO_SCALING:
            return NO_SCALING
        if device not in self._moved:
            scale, found_inf = self._given
            # To the CPU without waiting would be read before it is there.
            at_once = device.type != "cpu"
            if scale is not None:
                scale = scale.to(device, non_blocking=at_once)
            if found_inf is not None:
                # GradScaler sums over devices, and kernels look for exactly 1.
                found_inf = found_inf.to(device, non_blocking=at_once).clamp(max=1.0)
            self._moved[device] = Scaling(scale, found_inf)
        return self._moved[device]

    def backward(self, device: torch.device) -> Tensor:
        """Return what takes a counter back where the step was dropped."""
        found_inf = self.on(device).found_inf
        assert found_inf is not None  # only asked where `dropping`
        return -found_inf
