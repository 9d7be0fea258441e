"""The step: planned once, proved true at every step, replayed.

A plan keeps the lists of tensors of every kernel call. A step reads the groups,
fetches the gradients, proves that nothing else changed, and calls each bucket's
kernel once. It is given tensors and numbers and knows no policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._buckets import Bucket, Counters, Grads, flat
from selective_optim._cells import Cell, Key, Member, fused_still, path_of
from selective_optim._kernels import Group, Kernel, Scaling, Setting, States

Groups = Sequence[Group]
_grad_of = attrgetter("grad")
_layout_of = attrgetter("layout")
_params_of = itemgetter("params")


def _same_objects(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _equal(a: object, b: object) -> bool:
    """Compare values; a replaced tensor that has no truth value counts as different."""
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):
        return False


def _params(groups: Groups) -> list[Tensor]:
    return flat(map(_params_of, groups))


def make_counters(params: Iterable[Tensor]) -> dict[torch.device, Counters]:
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
    counters: dict[torch.device, Counters],
) -> list[Cell]:
    """Sort the parameters that have gradients: plain fused, sharded fused, functional."""
    cells: dict[Key, Cell] = {}
    slots: dict[torch.device, int] = {}
    for member in members:
        param, group = member.param, groups[member.group]
        slot = slots[param.device] = slots.get(param.device, -1) + 1
        if param.grad is None:
            continue
        state = kernel.state_of(states, param, group)
        key, tensors = path_of(kernel, group, member, param.grad, state)
        cell = cells.get(key) or cells.setdefault(key, Cell(key))
        cell.add(param, state, slot, tensors)
        if key.fused and kernel.counts:
            cell.steps.append(counters[param.device].adopt(slot, state))
    return sorted(
        cells.values(), key=lambda cell: (not cell.key.fused, cell.key.sharded)
    )


def on_device(scaling: Scaling, device: torch.device) -> Scaling:
    """Move ``grad_scale`` and ``found_inf`` to a device."""
    scale, found_inf = (
        v if v is None else v.to(device, non_blocking=True) for v in scaling
    )
    return scale, found_inf


class Plan:
    """Every kernel call of a step, for one set of parameters that have gradients."""

    def __init__(
        self,
        kernel: Kernel,
        groups: Groups,
        members: Sequence[Member],
        states: States,
        counters: dict[torch.device, Counters],
    ) -> None:
        self._kernel = kernel
        self._require_steppable(groups, members)
        self.params = [member.param for member in members]
        self._idle = [param for param in self.params if param.grad is None]
        self._cells = _make_cells(kernel, groups, members, states, counters)
        self._counters = self._advancing(counters)
        self._structure = list(map(kernel.structure, groups))
        self._values = flat(map(dict.values, groups))
        self._merged: list[list[Cell]] | None = None
        self._settle(groups)
        self._states = list(states.keys()), list(states.values())
        self._state_values = flat(map(dict.values, states.values()))
        self._state_proof: _torch.Proof | None = None
        self._specs: list[Any] = []
        # Momentum buffers come into being with the first step: then plan anew.
        self.once = any(cell.key.first for cell in self._cells)

    def _require_steppable(self, groups: Groups, members: Iterable[Member]) -> None:
        for index, group in enumerate(groups):
            self._kernel.require_ranges(group, index)
        for param, index, multiplier, _, label in members:
            if param.grad is not None and param.grad.is_sparse:
                self._kernel.refuse_sparse(groups[index], multiplier, label)

    def _advancing(self, counters: dict[torch.device, Counters]) -> list[Counters]:
        slots: dict[torch.device, list[int]] = {}
        for cell in self._cells:
            if cell.steps:
                slots.setdefault(cell.key.device, []).extend(cell.slots)
        for device, selected in slots.items():
            counters[device].select(selected)
        return [counters[device] for device in slots]

    def _settle(self, groups: Groups) -> None:
        """Read the hyperparameters and merge the cells that share them into buckets."""
        together: dict[Any, tuple[Setting, list[Cell]]] = {}
        for cell in self._cells:
            index, multiplier, form, *path = cell.key
            setting = self._kernel.setting(groups[index], multiplier, form)
            together.setdefault((setting.key, *path), (setting, []))[1].append(cell)
        merged = [cells for _, cells in together.values()]
        if merged != self._merged:
            self._merged = merged
            self._arrange(list(together.values()))
        for bucket, (setting, _) in zip(self._buckets, together.values()):
            bucket.setting = setting

    def _arrange(self, merged: list[tuple[Setting, list[Cell]]]) -> None:
        """Lay out the lists that a step replays, in the order of the buckets."""
        self._buckets: list[Bucket] = []
        self._plain = self._fused = stop = 0
        for setting, cells in merged:
            bucket = Bucket(self._kernel, setting, cells, stop)
            self._buckets.append(bucket)
            stop = bucket.part.stop
            self._fused = stop if bucket.key.fused else self._fused
            self._plain = (
                stop if bucket.key.fused and not bucket.key.sharded else self._plain
            )
        self._active: list[Tensor] = flat(bucket.params for bucket in self._buckets)
        self._local: list[Tensor] = flat(b.local for b in self._buckets)[: self._fused]
        layouts = [b.key.layout for b in self._buckets for _ in b.params]
        self._functional_layouts = layouts[self._fused :]
        self._proof: _torch.Proof | None = None

    def fetch(self) -> Grads:
        """Collect the gradients as they are now."""
        whole = list(map(_grad_of, self._active))
        if self._fused == self._plain:
            return Grads(whole, whole)
        shards = map(_torch.local_tensor, whole[self._plain : self._fused])
        return Grads(whole, [*whole[: self._plain], *shards])

    def prove(self, groups: Groups, states: States | None) -> Grads | None:
        """Return this step's gradients if the plan is still true, else ``None``.

        Args:
            groups: The parameter groups as they stand; new hyperparameters are
                taken over here.
            states: The optimizer's state where someone may have touched it.

        Raises:
            ValueError: A hyperparameter was set to a value out of range.
        """
        if not _same_objects(_params(groups), self.params):
            return None
        values = flat(map(dict.values, groups))
        if not _equal(values, self._values) and not self._reread(groups, values):
            return None
        if self._idle and not all(map(is_, map(_grad_of, self._idle), repeat(None))):
            return None
        try:
            grads = self.fetch()
            if self._gradients_hold(grads) and (
                states is None or self._states_hold(states)
            ):
                return grads
        except AttributeError:  # a gradient is None, or not sharded where it was
            pass
        return None

    def _reread(self, groups: Groups, values: list[Any]) -> bool:
        sparse = any(layout != torch.strided for layout in self._functional_layouts)
        if sparse or not _equal(
            list(map(self._kernel.structure, groups)), self._structure
        ):
            return False
        for index, group in enumerate(groups):
            self._kernel.require_ranges(group, index)
        self._settle(groups)
        self._values = values
        return True

    def _gradients_hold(self, grads: Grads) -> bool:
        layouts = list(map(_layout_of, grads.whole[self._fused :]))
        if layouts != self._functional_layouts:
            return False
        if self._fused > self._plain and not self._shards_hold(grads.whole):
            return False
        tensors = [*self._local, *grads.local[: self._fused]]
        if self._proof is None:
            return self._first_proof(tensors)
        return self._proof.holds(tensors)

    def _first_proof(self, tensors: list[Tensor]) -> bool:
        """Prove slowly, at the first replay, and record what to compare from then on."""
        grads = tensors[self._fused :]
        for bucket in self._buckets:
            lists = [grads[bucket.part], *bucket.moments] if bucket.key.fused else []
            if not all(
                fused_still(bucket.key, *each) for each in zip(bucket.local, *lists)
            ):
                return False
        self._proof = _torch.Proof(tensors) if tensors else None
        return True

    def _shards_hold(self, whole: list[Tensor]) -> bool:
        part = slice(self._plain, self._fused)
        params, grads = self._active[part], whole[part]
        if not _same_objects(list(map(_torch.local_tensor, params)), self._local[part]):
            return False
        specs = list(map(_torch.spec_of, grads))
        if _same_objects(specs, self._specs):
            return True
        where = map(_torch.placement, map(_torch.spec_of, params))
        if not all(
            a == b for a, b in zip(where, map(_torch.placement, specs), strict=True)
        ):
            return False
        self._specs = specs
        return True

    def _states_hold(self, states: States) -> bool:
        keys, values = self._states
        return (
            _same_objects(list(states.keys()), keys)
            and _same_objects(list(states.values()), values)
            and _same_objects(flat(map(dict.values, values)), self._state_values)
            and self._moments_hold()
        )

    def _moments_hold(self) -> bool:
        moments = [flat(bucket.moments) for bucket in self._buckets if bucket.key.fused]
        if self._state_proof is None:
            self._state_proof = _torch.Proof(flat(moments))
        return self._state_proof.holds(flat(moments))

    def run(self, grads: Grads, scaling: Scaling) -> None:
        """Step every bucket; counters advance before and fall back if skipped."""
        for counter in self._counters:
            counter.add(1.0)
        for bucket in self._buckets:
            bucket.step(grads, on_device(scaling, bucket.key.device))
        for counter in self._counters:
            _, found_inf = on_device(scaling, counter.flat.device)
            if found_inf is not None:
                counter.add(-found_inf)


class Stepper:
    """Keeps the plan of an optimizer and makes a new one when the old is not true."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._plan: Plan | None = None
        self._counters: dict[torch.device, Counters] = {}
        self._counted: list[tuple[int, torch.device]] = []

    def step(
        self,
        groups: Groups,
        members: Callable[[], Sequence[Member]],
        states: States,
        scaling: Scaling,
        touched: bool,
    ) -> None:
        """Step every parameter that has a gradient.

        Args:
            groups: The optimizer's parameter groups.
            members: Gives every parameter, in order, with what was decided for it.
            states: The optimizer's state, by parameter.
            scaling: ``grad_scale`` and ``found_inf`` of a ``GradScaler``, or ``None``.
            touched: Whether anyone outside may have changed the state.
        """
        plan, grads = self._plan, None
        if plan is not None:
            grads = plan.prove(groups, states if touched else None)
        if plan is None or grads is None:
            plan = self._plan = self._new_plan(groups, members(), states)
            grads = plan.fetch()
        plan.run(grads, scaling)
        if plan.once:
            self._plan = None

    def _new_plan(
        self, groups: Groups, members: Sequence[Member], states: States
    ) -> Plan:
        self._plan = None
        counted = [(id(param), param.device) for param in _params(groups)]
        if counted != self._counted:
            self._counters = (
                make_counters(_params(groups)) if self.kernel.counts else {}
            )
            self._counted = counted
        return Plan(self.kernel, groups, members, states, self._counters)
