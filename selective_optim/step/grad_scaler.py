"""A ``GradScaler``'s part in a step: what it hands over, and steps that it drops.

It lays the scale and whether infinity was found on an optimizer that takes them, which
ours does with ``fused=True`` alone (``torch/amp/grad_scaler.py``, 2.7 to 2.15). Fused
kernels unscale and skip by themselves; for torch's functional both is done here. What
advanced before a kernel skipped, as counters do, falls back. No device is waited for,
but where a first step with momentum may be dropped: only the host can leave out what
is yet to be made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selective_optim import _torch


class Scaling(NamedTuple):
    """What a ``GradScaler`` hands over, on one device."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


NO_SCALING = Scaling()


def scaling_of(optimizer: object) -> Scaling:
    """Read what a ``GradScaler`` lays on an optimizer for the time of a step."""
    return Scaling(
        getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    )


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


def unscale_(grads: Sequence[Tensor], grad_scale: Tensor) -> None:
    """Divide gradients of one device by the scale, as ``GradScaler.unscale_`` does."""
    device = grads[0].device
    inverse = grad_scale.double().reciprocal().float().to(device)
    values = [_torch.sparse_values(g) if g.is_sparse else g for g in grads]
    unread = torch.zeros((), dtype=torch.float32, device=device)
    _torch.amp_unscale_(values, unread, inverse)


def unless_dropped(found_inf: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return what is new, or where infinity was found what is old, on the device."""
    return torch.where(found_inf.bool(), old, new)


def drops(found_inf: Tensor, wait: bool) -> bool:
    """Tell whether a step is dropped, where that waits for no device or has to."""
    return bool((found_inf.is_cpu or wait) and found_inf.item())
