"""Every kernel call of a step: planned once, proved true at every step, replayed.

A plan is given tensors and numbers and knows no policy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import compress, groupby
from operator import attrgetter, length_hint, methodcaller
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.step import triton_adamw
from selective_optim.step.buckets import Bucket, FunctionalBucket, FusedBucket
from selective_optim.step.cells import Cell, Member, make_cells, require_dense
from selective_optim.step.counters import Advance, Counters
from selective_optim.step.grad_scaler import NO_SCALING, Scaling, Scalings
from selective_optim.step.guards import (
    GroupsGuard,
    TensorsGuard,
    equal,
    flat,
    grads_of,
    params_of,
    picker,
    same_objects,
    without_gradients,
)
from selective_optim.step.kernel import Kernel, decay_vanishes, require_no_nan
from selective_optim.step.setting import Call, Groups, Setting, States

_call = methodcaller("__call__")
_layout_of = attrgetter("layout")
_place_of = attrgetter("dtype", "device")


class Grads(NamedTuple):
    """The gradients of one step, in a plan's order.

    Args:
        whole: As the parameters have them, or what stands in for an absent one.
        local: As fused kernels get them: shards where sharded.
        there: Which parameters have one, or ``None`` where all have.
    """

    whole: list[Any]
    local: list[Any]
    there: list[bool] | None = None


class Program(NamedTuple):
    """The calls of one step over the fused buckets, in order.

    Args:
        before: Advance the counters.
        calls: Step the buckets.
        ends: For each bucket, how many of ``calls`` have run when it is done.
        after: Take the counters back where a scaler drops the step.
        threads: How many the caller has, where some calls run on one; else 0.
        lasting: Whether the calls are bound to lists alone, and hold no tensor while
            these are empty.
    """

    before: list[Call]
    calls: list[Call]
    ends: list[int]
    after: list[Call]
    threads: int
    lasting: bool


def _holds_a_tensor(call: Any) -> bool:
    """Tell whether a call is bound to a parameter itself, and not to a list of them."""
    return any(isinstance(each, Tensor) for each in getattr(call, "args", ())[:1])


class Plan:
    """Every kernel call of a step, for the parameters that have, or had, gradients.

    Args:
        kernel: Of the optimizer's class.
        groups: Its parameter groups.
        members: Every parameter, in order, with what was decided for it.
        states: Its state, by parameter; begun here as torch begins it.
        counters: Its step counters.
        lent: Whether anyone outside has the state in hand. A plan then keeps no
            tensor between steps: what is replaced or cleared is freed at once.
        stepping: Tokens of the parameters that the last plan stepped.

    Raises:
        ValueError: A hyperparameter is NaN.
        RuntimeError: A gradient is sparse where that cannot be stepped.
        KeyError: State lacks an entry, as in torch.
    """

    def __init__(
        self,
        kernel: Kernel,
        groups: Groups,
        members: Sequence[Member],
        states: States,
        counters: Counters,
        lent: bool,
        stepping: Mapping[int, object],
    ) -> None:
        # Before any state is made: a refusal leaves the optimizer as it was.
        require_no_nan(kernel, groups)
        require_dense(kernel, groups, members)
        self._kernel = kernel
        self._counters = counters
        self._lent = lent
        self._cells = make_cells(kernel, groups, members, states, counters, stepping)
        positions = {i for cell in self._cells for i in cell.positions}
        # Tokens and not parameters: a model that is gone must not live on in a plan.
        params = [member.param for member in members]
        tokens = [_torch.token_of(params[i]) for i in positions]
        self.stepping = dict(zip(map(id, tokens), tokens))
        # Those in no cell never had a gradient; the first one needs a new plan.
        self._any_idle = len(positions) < len(params)
        self._idle = picker([i for i in range(len(params)) if i not in positions])
        self._structure = list(map(kernel.structure, groups))
        # What the state holds lives as long as the optimizer, and is kept alive by
        # nothing here. Plain SGD has no state, and lets go after each step.
        stated = [param in states for param in params]
        self._keeps = not lent and all(stated[i] for i in positions)
        self._guard = GroupsGuard(groups, held=self._keeps and all(stated))
        # Momentum goes on otherwise than it begins, and a gradient that does not fit
        # may be followed by one that does: then plan anew.
        self.once = any(cell.key.first or cell.key.odd for cell in self._cells)
        self._some_alone = any(cell.key.alone for cell in self._cells)
        self._any_half = any(cell.key.dtype in _torch.HALF for cell in self._cells)
        self._merged: list[list[Cell]] | None = None
        self._settle(groups)
        self._gather(groups, states)
        counters.keep(self._advance)

    # Settling: hyperparameters make buckets of cells.

    def _settle(self, groups: Groups) -> None:
        """Read the hyperparameters and merge the cells that share them into buckets."""
        self._threads = _torch.thread_count()
        together: dict[Any, tuple[Setting, bool, list[Cell]]] = {}
        for cell in self._cells:
            index, terms, alone, *path = cell.key
            first = cell.key.first and cell.key.fused
            # The group's numbers of now: cells outlive a schedule, settings do not.
            setting = self._kernel.setting(groups[index], terms, first)
            alone &= self._threads > 1
            key = (setting.key, alone, *path)
            together.setdefault(key, (setting, alone, []))[2].append(cell)
        merged = [cells for *_, cells in together.values()]
        # As a rule a schedule moves all alike: the same cells go together, and lists
        # and proofs stay.
        if merged != self._merged:
            self._arrange(groups, merged)
            self._merged = merged
        for bucket, (setting, alone, _) in zip(self._buckets, together.values()):
            bucket.take(setting, alone)
        # Calls are bound to numbers. Where a number is a tensor, one that is written to
        # in place shows nowhere: then they are bound at every step.
        self._program: Program | None = None
        self._live = any(bucket.setting.live for bucket in self._buckets)
        self._fleeting = any(bucket.setting.fleeting for bucket in self._buckets)
        self.vanishing = self._find_vanishing() if self._any_half else None

    def _arrange(self, groups: Groups, merged: list[list[Cell]]) -> None:
        """Lay out the parameters, bucket after bucket: plain, sharded, functional."""
        self._fused: list[FusedBucket] = []
        self._functional: list[FunctionalBucket] = []
        start = 0
        for cells in merged:
            key = cells[0].key
            own = (self._kernel, cells, self._kernel.entries(groups[key.group]), start)
            if key.fused:
                self._fused.append(FusedBucket(*own))
            else:
                self._functional.append(FunctionalBucket(*own))
            start += sum(len(cell.positions) for cell in cells)
        self._buckets: list[Bucket] = [*self._fused, *self._functional]
        self._order = picker(flat(bucket.positions for bucket in self._buckets))
        sizes = [(len(b.positions), b.key) for b in self._buckets]
        self._plain = sum(n for n, key in sizes if key.fused and not key.sharded)
        self._count = sum(n for n, key in sizes if key.fused)
        self._total = start
        # Neighbors with the same entries are gathered in one walk over the state.
        alike = groupby(self._fused, lambda b: (b.entries, b.key.sharded))
        self._runs = [list(run) for _, run in alike]
        keys = [b.key for b in self._functional for _ in b.positions]
        self._layouts = [key.layout for key in keys]
        self._places = [(key.dtype, key.device) for key in keys]
        self._specs: list[Any] = []
        self._some_absent = False
        self._tensors = TensorsGuard()
        self._program = None
        # The lists stay, as those of buckets do, and calls that are bound to them.
        self._local: list[Tensor] = []
        self._moments: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._release()

    def _find_vanishing(self) -> Bucket | None:
        """Return a bucket whose decay is lost to rounding, if there is one."""
        for bucket in self._buckets:
            if decay_vanishes(bucket.setting, bucket.key.fused, bucket.key.dtype):
                return bucket
        return None

    # Gathering: tensors are taken in, and let go.

    def _gather(self, groups: Groups, states: States) -> None:
        """Take in the tensors as groups and state hold them now."""
        active = list(self._order(params_of(groups)))
        for run in self._runs:
            self._load(run, active, states)
        if self._program is None:
            self._advance = self._counters.advance(self._steps)
        self._present: tuple[list[bool], Advance] | None = None
        self._active: list[Tensor] | None = active

    def _load(
        self, run: Sequence[FusedBucket], active: list[Tensor], states: States
    ) -> None:
        """Take in the tensors of buckets in a row whose state has the same entries.

        Raises:
            KeyError: State lacks an entry.
        """
        start, entries = run[0].part.start, run[0].entries
        params = active[start : run[-1].part.stop]
        owns = [states.get(param) or {} for param in params] if entries else []
        columns = [[own[entry] for own in owns] for entry in entries]
        steps = columns.pop() if self._kernel.counts else []
        if run[0].key.sharded:
            params, *columns = map(_torch.local_tensors, (params, *columns))
        self._local += params
        self._moments += flat(columns)
        self._steps += steps
        if self._kernel.counts:
            columns.append(steps)
        for bucket in run:
            part = slice(bucket.part.start - start, bucket.part.stop - start)
            bucket.load(part, params, columns)

    def _release(self) -> None:
        """Let go of every tensor."""
        self._active = self._present = None
        if self._program is not None and not self._program.lasting:
            self._program = None
        for tensors in (self._local, self._moments, self._steps):
            tensors.clear()
        for bucket in self._fused:
            bucket.unload()

    def lend(self) -> None:
        """Keep no tensor from now on, and look at each at every step."""
        if not self._lent:
            self._lent, self._keeps = True, False
            self._guard.let_go()
            self._tensors = TensorsGuard()  # of moments and counters, too
            self._program = None  # whose counters were views
            self._release()

    # Proving: is the plan still true?

    def current_grads(self, groups: Groups, states: States) -> Grads | None:
        """Return this step's gradients if the plan is still true, else ``None``.

        New hyperparameters are taken over here.

        Raises:
            ValueError: A hyperparameter is NaN.
        """
        if self._fleeting or not self._guard.holds(groups):
            if not self._reread(groups):
                return None
        elif self._some_alone and _torch.thread_count() != self._threads:
            self._settle(groups)
        if self._any_idle and not without_gradients(self._idle(params_of(groups))):
            return None
        if self._active is None:
            try:
                self._gather(groups, states)
            except (KeyError, AttributeError, TypeError):
                return None  # an entry is gone, or no tensor: torch's words say it
        if self._lent and not self._functional_begun(states):
            return None
        whole = grads_of(self._active or [])
        if not self._some_absent and (grads := self._proved(whole, None)):
            return grads
        there = [grad is not None for grad in whole]
        self._some_absent = not all(there)
        if not self._some_absent:
            return self._proved(whole, None, look=True)
        filled = [self._stand_in(i) if g is None else g for i, g in enumerate(whole)]
        return self._proved(filled, there, look=True)

    def first_grads(self) -> Grads:
        """Return the gradients that a new plan was made for."""
        whole: list[Any] = grads_of(self._active or [])
        there = [grad is not None for grad in whole]
        self._some_absent = not all(there)
        shards = [
            grad if grad is None else _torch.local_tensor(grad)
            for grad in whole[self._plain : self._count]
        ]
        local = [*whole[: self._plain], *shards]
        return Grads(whole, local, there if self._some_absent else None)

    def _reread(self, groups: Groups) -> bool:
        """Take over new hyperparameters; not where the path depends on them."""
        sparse = any(cell.key.layout != torch.strided for cell in self._cells)
        if sparse or not self._guard.holds_params(groups):
            return False
        if self.changed(groups):
            return False
        require_no_nan(self._kernel, groups)
        self._settle(groups)
        self._guard.take(groups)
        return True

    def changed(self, groups: Groups) -> Groups:
        """List the groups whose flags are others than those that were planned."""
        return [
            group
            for group, flags in zip(groups, self._structure)
            if not equal(self._kernel.structure(group), flags)
        ]

    def _stand_in(self, position: int) -> Any:
        """Make what passes for an absent gradient: the parameter itself, detached."""
        if position >= self._count:
            return SimpleNamespace(layout=self._layouts[position - self._count])
        assert self._active is not None  # gathered
        return self._active[position].detach()

    def _proved(
        self, whole: list[Any], there: list[bool] | None, look: bool = False
    ) -> Grads | None:
        """Return the gradients if all is as planned, by guards or by a look at each."""
        local = whole
        try:
            if self._count < len(whole) and not self._functional_still(whole):
                return None
            if self._plain < self._count:
                if not self._shards_still(whole):
                    return None
                shards = whole[self._plain : self._count]
                local = [*whole[: self._plain], *_torch.local_tensors(shards)]
            elif self._count < len(whole):
                local = whole[: self._count]
        except AttributeError:  # a gradient is None, or not sharded where it was
            return None
        # State that nobody outside has seen is what the last step left.
        tensors = (*self._local, *local)
        if self._lent:
            tensors = (*tensors, *self._moments, *self._steps)
        if not self._tensors.holds(tensors):
            # No proof yet, or those of another dispatch state: look once, and remember.
            if not look or not all(b.fits(local[b.part]) for b in self._fused):
                return None
            self._tensors.admit(tensors)
        return Grads(whole, local, there)

    def _functional_begun(self, states: States) -> bool:
        """Tell whether nobody cleared the state that torch's functional reads."""
        if not self._kernel.counts or self._count == self._total:
            return True
        return all(map(states.get, (self._active or [])[self._count :]))

    def _functional_still(self, whole: list[Any]) -> bool:
        assert self._active is not None  # gathered
        layouts = list(map(_layout_of, whole[self._count :]))
        places = list(map(_place_of, self._active[self._count :]))
        return layouts == self._layouts and places == self._places

    def _shards_still(self, whole: list[Any]) -> bool:
        """Tell whether parameters and gradients are placed as they were."""
        assert self._active is not None  # gathered
        part = slice(self._plain, self._count)
        params, grads = self._active[part], whole[part]
        if not same_objects(_torch.local_tensors(params), self._local[part]):
            return False
        # DTensor makes few specs and shares them, so that identity is quick to hold.
        specs = _torch.specs_of(grads)
        if same_objects(specs, self._specs):
            return True
        where = map(_torch.placement, map(_torch.spec_of, params))
        if not all(a == b for a, b in zip(where, map(_torch.placement, specs))):
            return False
        self._specs = specs
        return True

    # Running.

    def run(self, grads: Grads, states: States, scaling: Scaling) -> None:
        """Step every bucket; counters advance before and fall back if skipped."""
        assert self._active is not None  # gathered
        scalings = Scalings(scaling)
        # Functional ones first: they may raise, and then nothing else has changed.
        for other in self._functional:
            params, own = self._active[other.part], grads.whole[other.part]
            there = grads.there[other.part] if grads.there else [True] * len(params)
            other.step(params, own, there, states, scalings.on(other.key.device))
        # Into the lists that calls are bound to, and out of them in any case: gradients
        # that someone sets to None must be freed.
        for bucket in self._fused:
            bucket.batch.grads[:] = grads.local[bucket.part]
        try:
            program = self._program
            steady = scaling == NO_SCALING and grads.there is None and not self._live
            if program is None or not steady:
                # Scales, absent gradients and tensor rates are of this step alone.
                program = self._assemble(grads.there, scalings)
                self._program = program if steady else None
            self._perform(program, scalings)
            if self.once and scalings.dropping:
                self._forget_dropped(states, scalings)
        finally:
            for bucket in self._fused:
                bucket.batch.grads.clear()
            if not self._keeps:
                self._release()

    def _forget_dropped(self, states: States, scalings: Scalings) -> None:
        """Let dampened momentum begin again with the next step if this was dropped.

        Only the host can leave a buffer out, so this once it waits for the device.
        """
        assert self._active is not None  # gathered
        for bucket in self._fused:
            found_inf = scalings.on(bucket.key.device).found_inf
            if bucket.key.first and found_inf is not None and found_inf.item():
                for param in self._active[bucket.part]:
                    del states[param]["momentum_buffer"]

    def _assemble(self, there: list[bool] | None, scalings: Scalings) -> Program:
        """Put together the calls of a step over the fused buckets."""
        advance = self._advance if there is None else self._advance_of(there)
        calls: list[Call] = []
        ends = []
        alone = False
        for bucket in self._fused:
            batch = bucket.present(there)
            if batch.params:
                # Threads are set where they change, not around every call.
                if bucket.alone != alone:
                    alone = bucket.alone
                    calls.append(self._on(1 if alone else self._threads))
                own = scalings.on(bucket.key.device)
                calls += self._kernel.calls(bucket.setting, batch, own)
            ends.append(len(calls))
        if alone:
            calls.append(self._on(self._threads))
        if len(calls) >= triton_adamw.FEWEST and triton_adamw.switched_on():
            calls, ends = triton_adamw.join(calls, ends)
        return Program(
            before=advance.by(lambda device: 1.0),
            calls=calls,
            ends=ends,
            after=advance.by(scalings.backward) if scalings.dropping else [],
            threads=self._threads if any(b.alone for b in self._fused) else 0,
            lasting=advance.lasting and not any(map(_holds_a_tensor, calls)),
        )

    @staticmethod
    def _on(threads: int) -> Call:
        assert _torch.set_threads is not None  # or nothing would be alone
        return partial(_torch.set_threads, threads)

    def _advance_of(self, there: list[bool]) -> Advance:
        """Find out how the counters advance of those that have a gradient."""
        if self._present is None or self._present[0] != there:
            steps = list(compress(self._steps, there))
            self._present = there, self._counters.advance(steps)
        return self._present[1]

    def _perform(self, program: Program, scalings: Scalings) -> None:
        """Run all calls without a line of Python between them.

        Python looks for signals between lines: an interrupt comes before the first
        call or after the last, and never between a counter and its parameters.
        """
        # At the end a call of nothing, which tells whether the one before it failed.
        left = iter((*program.before, *program.calls, *program.after, tuple))
        try:
            deque(map(_call, left), maxlen=0)
        except BaseException:
            if program.threads:
                self._on(program.threads)()
            if rest := length_hint(left):
                done = len(program.calls) + len(program.after) - rest
                self._take_back(program, done, scalings)
            raise

    def _take_back(self, program: Program, done: int, scalings: Scalings) -> None:
        """Let the counters of buckets that a failed call left out stand as before."""
        if done < 0:  # it was a counter that failed
            return
        for call in program.after:
            call()
        for bucket, end in zip(self._fused, program.ends):
            if end > done and bucket.batch.steps:
                dropped = scalings.on(bucket.key.device).found_inf
                amount = -1.0 if dropped is None else dropped - 1.0
                _torch.foreach_add_(bucket.batch.steps, amount)
