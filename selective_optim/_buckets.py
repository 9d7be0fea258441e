"""One kernel call: the tensors that go into it, and the counters it reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._cells import Cell, Key
from selective_optim._kernels import Kernel, Lists, Scaling, Setting, State, is_zero
from selective_optim._snapshot import flat


class Counters:
    """Step counters of the parameters of one device, as views of one tensor.

    Adding one to 1,000 separate counters takes four times as long as the fused
    kernel takes for 1,000 small parameters; adding it to what they view, nothing.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.flat = torch.zeros(size, dtype=torch.float32, device=device)
        self.views = list(self.flat.unbind())
        self._advancing: Tensor | None = None

    def adopt(self, slots: Sequence[int], states: Sequence[State]) -> list[Tensor]:
        """Make the views at ``slots`` the states' counters, their values unchanged."""
        views = [self.views[slot] for slot in slots]
        new = [i for i, own in enumerate(states) if own["step"] is not views[i]]
        if new:
            # All are read before one is written: states may hold each other's views.
            place = {"device": self.flat.device, "dtype": self.flat.dtype}
            values = [states[i]["step"].to(**place).reshape(()) for i in new]
            places = torch.tensor([slots[i] for i in new], dtype=torch.long)
            self.flat[places.to(self.flat.device)] = torch.stack(values)
            for i in new:
                states[i]["step"] = views[i]
        return views

    def select(self, slots: Sequence[int]) -> None:
        """Fix which counters advance: all, or those that step now."""
        self._advancing = None
        if len(slots) < len(self.views):
            ones = torch.zeros(self.flat.shape, dtype=self.flat.dtype)
            ones[torch.tensor(slots, dtype=torch.long)] = 1.0
            self._advancing = ones.to(self.flat.device, non_blocking=True)

    def add(self, amount: float | Tensor) -> None:
        """Advance the selected counters, or take an advance back."""
        self.flat.add_(amount if self._advancing is None else self._advancing * amount)


class Grads(NamedTuple):
    """The gradients of one step.

    Args:
        whole: As the parameters have them.
        local: As kernels get them: shards where sharded; only those to be fused.
        there: Which parameters have one, or ``None`` where all have.
    """

    whole: list[Any]
    local: list[Any]
    there: list[bool] | None = None


class Rows(NamedTuple):
    """What a bucket steps now, parameter by parameter in every list."""

    params: list[Tensor]
    states: list[State]
    whole: list[Tensor]
    local: list[Tensor]
    shards: list[Tensor]
    steps: list[Tensor]
    moments: Lists

    def present(self, there: list[bool]) -> Rows:
        """Keep the parameters that have a gradient."""

        def kept(entries: list[Any]) -> list[Any]:
            return list(compress(entries, there))

        return Rows(
            kept(self.params),
            kept(self.states),
            kept(self.whole),
            kept(self.local),
            kept(self.shards),
            kept(self.steps),
            list(map(kept, self.moments)),
        )


class Bucket:
    """Cells of equal settings, stepped by one kernel call.

    ``part`` says which of a step's gradients are this bucket's.
    """

    def __init__(self, kernel: Kernel, cells: Sequence[Cell], start: int) -> None:
        self._kernel = kernel
        self.key: Key = cells[0].key
        self.params: list[Tensor] = flat(cell.params for cell in cells)
        self.local: list[Tensor] = flat(cell.local for cell in cells)
        self.slots: list[int] = flat(cell.slots for cell in cells)
        self.steps: list[Tensor] = flat(cell.steps for cell in cells)
        self.states: list[State] = flat(cell.states for cell in cells)
        self.moments: Lists = [
            flat(entry) for entry in zip(*(cell.moments for cell in cells))
        ]
        self.part = slice(start, start + len(self.params))

    def take(self, setting: Setting) -> None:
        """Take over the hyperparameters of the steps to come."""
        self._setting = setting
        self._call = self._kernel.bind(setting) if self.key.fused else None
        shrinks = not is_zero(setting.shrink)
        self._acts_outside_the_kernel = not self.key.fused or self.key.first or shrinks

    def replay(self, grads: Grads) -> None:
        """Step every parameter once: all have gradients, nothing is scaled."""
        assert self._call is not None  # fused
        shards = grads.local[self.part]
        self._call(self.local, shards, self.moments, self.steps, (None, None), False)

    def step(self, grads: Grads, scaling: Scaling) -> None:
        """Step every parameter once, or none where ``found_inf`` says so."""
        found_inf = scaling[1] if self._acts_outside_the_kernel else None
        if found_inf is not None and found_inf.item():
            return
        rows = self._rows(grads)
        if not rows.params:
            return
        if self._call is None:
            if scaling[0] is not None:
                _torch.unscale_(rows.whole, scaling[0])
            self._kernel.functional(self._setting, rows.params, rows.whole, rows.states)
        elif self.key.first:
            self._start(rows, scaling)
        else:
            self._call(
                rows.local, rows.shards, rows.moments, rows.steps, scaling, False
            )

    def _rows(self, grads: Grads) -> Rows:
        rows = Rows(
            self.params,
            self.states,
            grads.whole[self.part],
            self.local,
            grads.local[self.part],
            self.steps,
            self.moments,
        )
        there = grads.there and grads.there[self.part]
        return rows.present(there) if there and not all(there) else rows

    def _start(self, rows: Rows, scaling: Scaling) -> None:
        """Let the kernel write the first gradients into new momentum buffers."""
        assert self._call is not None  # the caller asked
        buffers = [torch.empty_like(grad) for grad in rows.whole]
        shards = map(_torch.local_tensor, buffers) if self.key.sharded else buffers
        self._call(rows.local, rows.shards, [list(shards)], [], scaling, True)
        for state, buffer in zip(rows.states, buffers):
            state["momentum_buffer"] = buffer
