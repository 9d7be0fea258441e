"""One kernel call: the tensors that go into it, and the counters it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._cells import Cell, Key
from selective_optim._kernels import (
    FusedCall,
    Kernel,
    Lists,
    Scaling,
    Setting,
    State,
    is_zero,
)


def flat(lists: Iterable[Iterable[Any]]) -> list[Any]:
    """Join lists into one."""
    return list(chain.from_iterable(lists))


class Counters:
    """Step counters of the parameters of one device, as views of one tensor.

    Adding one to 1,000 separate counters takes four times as long as the fused
    kernel takes for 1,000 small parameters; adding it to what they view, nothing.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.flat = torch.zeros(size, dtype=torch.float32, device=device)
        self.views = list(self.flat.unbind())
        self._advancing: Tensor | None = None

    def adopt(self, slot: int, state: State) -> Tensor:
        """Make the view at ``slot`` the state's counter, its value unchanged."""
        view = self.views[slot]
        if state["step"] is not view:
            view.copy_(state["step"])
            state["step"] = view
        return view

    def select(self, slots: Sequence[int]) -> None:
        """Fix which counters advance: all, or those that step now."""
        self._advancing = None
        if len(slots) < len(self.views):
            self._advancing = torch.zeros_like(self.flat)
            self._advancing[torch.tensor(slots, device=self.flat.device)] = 1.0

    def add(self, amount: float | Tensor) -> None:
        """Advance the selected counters, or take an advance back."""
        self.flat.add_(amount if self._advancing is None else self._advancing * amount)


class Grads(NamedTuple):
    """The gradients of one step: as the parameters have them, and as kernels get them."""

    whole: list[Tensor]
    local: list[Tensor]


class Bucket:
    """Cells of equal settings, stepped by one kernel call.

    ``part`` says which of a step's gradients are this bucket's.
    """

    def __init__(
        self, kernel: Kernel, setting: Setting, cells: Sequence[Cell], start: int
    ) -> None:
        self._kernel = kernel
        self.setting = setting
        self.key: Key = cells[0].key
        self.params: list[Tensor] = flat(cell.params for cell in cells)
        self.local: list[Tensor] = flat(cell.local for cell in cells)
        self.part = slice(start, start + len(self.params))
        self._states: list[State] = flat(cell.states for cell in cells)
        self._steps: list[Tensor] = flat(cell.steps for cell in cells)
        self.moments: Lists = [
            flat(entry) for entry in zip(*(cell.moments for cell in cells))
        ]

    def step(self, grads: Grads, scaling: Scaling) -> None:
        """Step every parameter once, or none where ``found_inf`` says so."""
        grad_scale, found_inf = scaling
        if found_inf is not None and self._acts_outside_the_kernel and found_inf.item():
            return
        whole = grads.whole[self.part]
        if not self.key.fused:
            if grad_scale is not None:
                _torch.unscale_(whole, grad_scale)
            self._kernel.functional(self.setting, self.params, whole, self._states)
        elif self.key.first:
            self._start(whole, grads.local[self.part], scaling)
        else:
            self._call(grads.local[self.part], self.moments, scaling, first=False)

    @property
    def _acts_outside_the_kernel(self) -> bool:
        shrinks = not is_zero(self.setting.shrink)
        return not self.key.fused or self.key.first or shrinks

    def _call(
        self, grads: list[Tensor], moments: Lists, scaling: Scaling, first: bool
    ) -> None:
        call = FusedCall(self.local, grads, moments, self._steps, scaling, first)
        self._kernel.fused(self.setting, call)

    def _start(
        self, whole: list[Tensor], local: list[Tensor], scaling: Scaling
    ) -> None:
        """Let the kernel write the first gradients into new momentum buffers."""
        buffers = [torch.empty_like(grad) for grad in whole]
        shards = map(_torch.local_tensor, buffers) if self.key.sharded else buffers
        self._call(local, [list(shards)], scaling, first=True)
        for state, buffer in zip(self._states, buffers):
            state["momentum_buffer"] = buffer
