"""The step: planned once, proved true at every step, replayed.

A plan keeps the lists of tensors of every kernel call. A step reads the groups,
fetches the gradients, proves that nothing else changed, and calls each bucket's
kernel once. It is given tensors and numbers and knows no policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from selective_optim._buckets import Bucket, Counters, Grads
from selective_optim._cells import Cell, Key, Member, path_of
from selective_optim._evidence import (
    Evidence,
    StateEvidence,
    without_gradients,
)
from selective_optim._kernels import Kernel, Scaling, Setting, States
from selective_optim._snapshot import Groups, Snapshot, equal, flat

NO_SCALING: Scaling = (None, None)
AllCounters = dict[torch.device, Counters]


def make_counters(params: Iterable[Tensor]) -> AllCounters:
    """Make room for the step counters of all parameters, device by device."""
    sizes: dict[torch.device, int] = {}
    for param in params:
        sizes[param.device] = sizes.get(param.device, 0) + 1
    return {device: Counters(device, size) for device, size in sizes.items()}


def _make_cells(
    kernel: Kernel,
    groups: Groups,
    members: Iterable[Member],
    states: States,
    counters: AllCounters,
    active_before: set[int],
) -> list[Cell]:
    """Sort the parameters that step: plain fused, sharded fused, functional."""
    cells: dict[Key, Cell] = {}
    slots: dict[torch.device, int] = {}
    for member in members:
        param, group = member.param, groups[member.group]
        slot = slots[param.device] = slots.get(param.device, -1) + 1
        if param.grad is None and not (
            id(param) in active_before and kernel.has_state(states, param, group)
        ):
            continue
        state = kernel.state_of(states, param, group)
        key, tensors = path_of(kernel, group, member, param.grad, state)
        cell = cells.get(key) or cells.setdefault(key, Cell(key, member.label))
        cell.add(param, state, slot, tensors)
    _adopt_counters([cell for cell in cells.values() if cell.key.fused], counters)
    return sorted(
        cells.values(), key=lambda cell: (not cell.key.fused, cell.key.sharded)
    )


def _adopt_counters(cells: Iterable[Cell], counters: AllCounters) -> None:
    """Count the steps of fused cells together, device by device."""
    for device, counter in counters.items():
        mine = [cell for cell in cells if cell.key.device == device]
        slots = flat(cell.slots for cell in mine)
        views = iter(counter.adopt(slots, flat(cell.states for cell in mine)))
        for cell in mine:
            cell.steps = [next(views) for _ in cell.slots]


def on_device(scaling: Scaling, device: torch.device) -> Scaling:
    """Move ``grad_scale`` and ``found_inf`` to a device."""
    scale, found_inf = scaling
    # To the CPU without waiting would be read before it is there.
    at_once = device.type != "cpu"
    if scale is not None:
        scale = scale.to(device, non_blocking=at_once)
    if found_inf is not None:
        # GradScaler sums over devices, and kernels look for exactly 1.
        found_inf = found_inf.to(device, non_blocking=at_once).clamp(max=1.0)
    return scale, found_inf


class Plan:
    """Every kernel call of a step, for the parameters that have, or had, gradients."""

    def __init__(
        self,
        kernel: Kernel,
        groups: Groups,
        members: Sequence[Member],
        states: States,
        counters: AllCounters,
        active_before: set[int],
    ) -> None:
        self._kernel = kernel
        self._require_steppable(groups, members)
        self._cells = _make_cells(
            kernel, groups, members, states, counters, active_before
        )
        self.active = {id(param) for cell in self._cells for param in cell.params}
        self._structure = list(map(kernel.structure, groups))
        self._snapshot = Snapshot(groups)
        self._idle = [p for p in self._snapshot.params if id(p) not in self.active]
        self._counters = counters
        self._merged: list[list[Cell]] | None = None
        self._settle(groups)
        self._state = StateEvidence(states, self._buckets)
        # Momentum buffers come into being with the first step, and a gradient that
        # does not fit may be followed by one that does: then plan anew.
        self.once = any(cell.key.first or cell.key.odd for cell in self._cells)

    def _require_steppable(self, groups: Groups, members: Iterable[Member]) -> None:
        for index, group in enumerate(groups):
            self._kernel.require_ranges(group, index)
        for param, index, multiplier, _, label in members:
            if param.grad is not None and param.grad.is_sparse:
                self._kernel.refuse_sparse(groups[index], multiplier, label)

    def _settle(self, groups: Groups) -> None:
        """Read the hyperparameters and merge the cells that share them into buckets."""
        together: dict[Any, tuple[Setting, list[Cell]]] = {}
        self.vanishing: Cell | None = None
        for cell in self._cells:
            index, multiplier, form, *path = cell.key
            setting = self._kernel.setting(groups[index], multiplier, form)
            together.setdefault((setting.key, *path), (setting, []))[1].append(cell)
            if self._kernel.decay_vanishes(setting, cell.key.fused, cell.key.dtype):
                self.vanishing = self.vanishing or cell
        merged = [cells for _, cells in together.values()]
        if merged != self._merged:
            self._merged = merged
            self._arrange(merged)
        for bucket, (setting, _) in zip(self._buckets, together.values()):
            bucket.take(setting)

    def _arrange(self, merged: list[list[Cell]]) -> None:
        """Lay out the lists that a step replays, bucket after bucket."""
        self._buckets: list[Bucket] = []
        for cells in merged:
            start = self._buckets[-1].part.stop if self._buckets else 0
            self._buckets.append(Bucket(self._kernel, cells, start))
        self._fused_buckets = [b for b in self._buckets if b.key.fused]
        self._functional_buckets = [b for b in self._buckets if not b.key.fused]
        self._evidence = Evidence(self._buckets)
        self._select(None)

    def _select(self, there: list[bool] | None) -> None:
        """Fix which step counters advance: those of parameters that have gradients."""
        self._there = there
        slots: dict[torch.device, list[int]] = {}
        for bucket in self._buckets:
            if bucket.steps:
                own = compress(bucket.slots, there[bucket.part]) if there else None
                slots.setdefault(bucket.key.device, []).extend(own or bucket.slots)
        self._advancing = [self._counters[device] for device in slots]
        for counter, chosen in zip(self._advancing, slots.values()):
            counter.select(chosen)

    def prove(self, groups: Groups, states: States | None) -> Grads | None:
        """Return this step's gradients if the plan is still true, else ``None``.

        Args:
            groups: The parameter groups as they stand; new hyperparameters are
                taken over here.
            states: The optimizer's state where someone may have touched it.

        Raises:
            ValueError: A hyperparameter was set to a value out of range.
        """
        if not self._snapshot.holds(groups) and not self._reread(groups):
            return None
        if self._idle and not without_gradients(self._idle):
            return None
        if states is not None and not self._state.holds(states):
            return None
        return self._evidence.gradients()

    def gradients(self) -> Grads:
        """Fetch the gradients of a plan that was just made for them."""
        return self._evidence.fetch()

    def _reread(self, groups: Groups) -> bool:
        """Take over new hyperparameters; not where the path depends on them."""
        sparse = any(cell.key.layout != torch.strided for cell in self._cells)
        structure = list(map(self._kernel.structure, groups))
        if sparse or not self._snapshot.has_params(groups):
            return False
        if not equal(structure, self._structure):
            return False
        for index, group in enumerate(groups):
            self._kernel.require_ranges(group, index)
        self._settle(groups)
        self._snapshot.take_values(groups)
        return True

    def run(self, grads: Grads, scaling: Scaling) -> None:
        """Step every bucket; counters advance before and fall back if skipped."""
        if grads.there != self._there:
            self._select(grads.there)
        plain = scaling == NO_SCALING and grads.there is None
        # Functional ones first: they may raise, and then nothing else has changed.
        for bucket in self._functional_buckets:
            bucket.step(grads, on_device(scaling, bucket.key.device))
        for counter in self._advancing:
            counter.add(1.0)
        for bucket in self._fused_buckets:
            if plain and not bucket.key.first:
                bucket.replay(grads)
            else:
                bucket.step(grads, on_device(scaling, bucket.key.device))
        for counter in self._advancing:
            _, found_inf = on_device(scaling, counter.flat.device)
            if found_inf is not None:
                counter.add(-found_inf)
