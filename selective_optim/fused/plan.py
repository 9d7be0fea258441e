"""The accelerator: every fused kernel call of a step, planned once and replayed.

A plan is given tensors and numbers and knows no policy. It proves at every step that
the layout of the parts still holds, also of those that the class steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import compress, groupby, repeat
from operator import attrgetter, eq, is_, length_hint, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.fused.buckets import Advance, Bucket, Counters, begin_state
from selective_optim.fused.guards import (
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
from selective_optim.step.kernels import Kernel, require_no_nan
from selective_optim.step.parts import DecidedParam, Part, make_layout
from selective_optim.step.setting import (
    NO_SCALING,
    Call,
    Groups,
    Scaling,
    Setting,
    States,
    scaling_on,
)

OnDevice = Callable[[torch.device], Any]  # a scaling, on a device
_call = methodcaller("__call__")
_place_of, _grad_layout_of = attrgetter("dtype", "device"), attrgetter("grad.layout")


class Grads(NamedTuple):
    """The gradients of one step, in a plan's order."""

    local: list[Any]  # shards where sharded, or what stands in for an absent one
    there: list[bool] | None = None  # which are not absent; None where all are there


class Program(NamedTuple):
    """The calls of one step over the fused buckets, in order."""

    before: list[Call]  # advance the counters
    calls: list[Call]  # step the buckets
    ends: list[int]  # for each bucket, how many of ``calls`` have run when it is done
    after: list[Call]  # take the counters back where a scaler drops the step
    threads: int  # of the caller, where some calls run on one; else 0
    lasting: bool  # whether calls are bound to lists alone: no tensor while these empty


def _holds_a_tensor(call: Any) -> bool:
    """Tell whether a call is bound to a parameter itself, and not to a list of them."""
    return any(isinstance(each, Tensor) for each in getattr(call, "args", ())[:1])


def _layouts_of(params: Sequence[Tensor]) -> list[torch.layout]:
    """List the layouts of gradients, where an absent one is taken to be dense."""
    try:
        return list(map(_grad_layout_of, params))  # all in C
    except AttributeError:
        grads = grads_of(params)
        return [torch.strided if grad is None else grad.layout for grad in grads]


def _share_counters(params: Sequence[DecidedParam], states: States) -> bool:
    owns = [own for p in params if "step" in (own := states.get(p.param) or {})]
    return _distinct([own["step"] for own in owns]) < _distinct(owns)


def _distinct(objects: Sequence[object]) -> int:
    return len(set(map(id, objects)))


class Plan:
    """The parts of a step, and the kernel calls of those that are fused.

    Where someone outside may edit the state (``exposed``), a plan keeps no tensor
    between steps: what is replaced or cleared is freed at once.
    """

    def __init__(
        self,
        kernel: Kernel,
        groups: Groups,
        params: Sequence[DecidedParam],
        states: States,
        counters: Counters,
        exposed: bool,
        stepped: Mapping[int, object],
    ) -> None:
        # Before any state is made: a refusal leaves the optimizer as it was.
        require_no_nan(kernel, groups)
        self._kernel = kernel
        self._counters = counters
        self._exposed = exposed
        # Where counters are shared, each group counts for itself, as the class does it.
        planned = not (exposed and _share_counters(params, states))
        given = (kernel, groups, params, states, stepped)
        parts, idle, self.once = make_layout(*given, planned=planned)
        fused = [part for part in parts if part.key.device is not None]
        # What the optimizer's own class steps.
        self.rest = [part for part in parts if part.key.device is None]
        # Plain ones first; among both, those that take all threads.
        self._parts = sorted(fused, key=lambda p: (p.key.sharded, p.key.single_thread))
        begin_state(kernel, groups, fused, params, states, counters)
        tensors = [each.param for each in params]
        self._note_parts(parts, idle, tensors)
        self._structure = list(map(kernel.structure, groups))
        # What the state holds lives as long as the optimizer, and is kept alive by
        # nothing here. Plain SGD has no state, and releases tensors after each step.
        mine = {i for part in fused for i in part.positions}
        self._keeps = not exposed and all(tensors[i] in states for i in mine)
        held = self._keeps and all(tensor in states for tensor in tensors)
        self._guard = GroupsGuard(groups, held=held)
        self._some_single = any(part.key.single_thread for part in fused)
        self._merged: list[list[Part]] | None = None
        self._merge_parts(groups)
        self._gather(groups, states)
        counters.keep(self._advance)

    def _note_parts(
        self, parts: Sequence[Part], idle: Sequence[int], tensors: Sequence[Tensor]
    ) -> None:
        """Note who has a part, who has none yet, and what would change the rest."""
        # Tokens, not parameters: a plan must not keep a deleted model alive.
        tokens = [_torch.token_of(tensors[i]) for part in parts for i in part.positions]
        self.stepped = dict(zip(map(id, tokens), tokens))  # for the next plan
        # Parameters in no part had no gradient yet; their first one needs a new plan.
        self._any_idle = bool(idle)
        self._idle = picker(idle)
        self._rest_of = picker([i for part in self.rest for i in part.positions])
        mine = self._rest_of(tensors)
        self._rest_places = list(map(_place_of, mine))
        self._rest_layouts = _layouts_of(mine)
        self._some_sparse = any(each != torch.strided for each in self._rest_layouts)

    # Hyperparameters make buckets of parts.

    def _merge_parts(self, groups: Groups) -> None:
        """Read the hyperparameters and merge the parts that share them into buckets."""
        self._threads = _torch.thread_count()
        together: dict[Any, tuple[Setting, bool, list[Part]]] = {}
        for part in self._parts:
            decay_key, index, _, sharded, _, single, *place = part.key
            # The group's numbers of now: parts outlive a schedule, settings do not.
            group = groups[index]
            setting = self._kernel.setting(group, self._kernel.share(group, decay_key))
            single &= self._threads > 1
            key = (setting.key, single, sharded, *place)
            together.setdefault(key, (setting, single, []))[2].append(part)
        merged = [parts for *_, parts in together.values()]
        # A schedule mostly moves all alike: the same parts go together, and lists and
        # proofs stay.
        if merged != self._merged:
            self._arrange(groups, merged)
            self._merged = merged
        for bucket, (setting, single, _) in zip(self._buckets, together.values()):
            bucket.setting, bucket.single_thread = setting, single
        # Calls are bound to numbers. Where a number is a tensor, one that is written to
        # in place shows nowhere: then they are bound at every step.
        self._program: Program | None = None
        self._live = any(bucket.setting.live for bucket in self._buckets)
        self._fleeting = any(bucket.setting.share.fleeting for bucket in self._buckets)

    def _arrange(self, groups: Groups, merged: list[list[Part]]) -> None:
        """Lay out the parameters, bucket after bucket: plain ones, then sharded."""
        self._buckets: list[Bucket] = []
        start = 0
        for parts in merged:
            entries = self._kernel.entries(groups[parts[0].key.group])
            self._buckets.append(Bucket(self._kernel, parts, entries, start))
            start += sum(len(part.positions) for part in parts)
        self._order = picker(flat(bucket.positions for bucket in self._buckets))
        plain = [b for b in self._buckets if not b.key.sharded]
        self._plain = sum(len(bucket.positions) for bucket in plain)
        self._count = start
        # Neighbors with the same entries are gathered in one walk over the state.
        alike = groupby(self._buckets, lambda b: (b.entries, b.key.sharded))
        self._runs = [list(run) for _, run in alike]
        self._specs: list[Any] = []
        self._some_absent = False
        self._tensors = TensorsGuard()
        self._program = None
        # The lists stay, as those of buckets do, and calls that are bound to them.
        self._local: list[Tensor] = []
        self._moments: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._release()

    # Gathering: tensors are taken in, and let go.

    def _gather(self, groups: Groups, states: States) -> None:
        active = list(self._order(params_of(groups)))
        for run in self._runs:
            self._load(run, active, states)
        if self._exposed and self._steps and _distinct(self._steps) < _distinct(active):
            raise KeyError("a step counter of its own")
        if self._program is None:
            self._advance = self._counters.advance(self._steps)
        self._present: tuple[list[bool], Advance] | None = None
        self._active: list[Tensor] | None = active

    def _load(
        self, run: Sequence[Bucket], active: list[Tensor], states: States
    ) -> None:
        """Take in the tensors of buckets in a row whose state has the same entries."""
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
        self._active = self._present = None
        if self._program is not None and not self._program.lasting:
            self._program = None
        for tensors in (self._local, self._moments, self._steps):
            tensors.clear()
        for bucket in self._buckets:
            bucket.unload()

    def expose(self) -> None:
        """Keep no tensor from now on, and look at each at every step."""
        if not self._exposed:
            # First: a proof takes as many tensors as it was made of.
            self._tensors = TensorsGuard()  # of moments and counters, too
            self._exposed, self._keeps = True, False
            self._guard.release()
            self._program = None  # whose counters were views
            self._release()

    # Checking: is the plan still valid?

    def current_grads(self, groups: Groups, states: States) -> Grads | None:
        """Return this step's gradients if the plan is still true, else ``None``.

        New hyperparameters are taken over here; one that is NaN raises ValueError.
        """
        if self._fleeting or not self._guard.holds(groups):
            if not self._reread(groups):
                return None
        elif self._some_single and _torch.thread_count() != self._threads:
            self._merge_parts(groups)
        params = params_of(groups) if self._any_idle or self.rest else []
        if self._any_idle and not without_gradients(self._idle(params)):
            return None
        if self.rest and not self._rest_still(params):
            return None
        if self._active is None:
            try:
                self._gather(groups, states)
            except (KeyError, AttributeError, TypeError):
                return None  # an entry is gone, or no tensor: torch's words say it
        if not self._buckets:
            return Grads([])
        whole = grads_of(self._active or [])
        if not self._some_absent and (grads := self._proved(whole, None)):
            return grads
        there = [grad is not None for grad in whole]
        self._some_absent = not all(there)
        if not self._some_absent:
            return self._proved(whole, None, look=True)
        filled = [
            param.detach() if grad is None else grad
            for param, grad in zip(self._active or [], whole)
        ]
        return self._proved(filled, there, look=True)

    def first_grads(self) -> Grads:
        """Return the gradients that a new plan was made for."""
        whole: list[Any] = grads_of(self._active or [])
        self._some_absent = any(map(is_, whole, repeat(None)))
        plain, sharded = whole[: self._plain], whole[self._plain :]
        local = [*plain, *(g if g is None else _torch.local_tensor(g) for g in sharded)]
        if self._some_absent:
            return Grads(local, [grad is not None for grad in whole])
        if self._buckets and not self.once:  # the layout has just looked at all
            self._tensors.admit(self._walked(local))
        return Grads(local)

    def _reread(self, groups: Groups) -> bool:
        """Take over new hyperparameters; not where the parts depend on them."""
        if not self._guard.holds_params(groups) or self._some_sparse:
            return False
        pairs = zip(map(self._kernel.structure, groups), self._structure)
        # An unknown key may be one for which the step raises.
        if not self._guard.holds_keys(groups) or not all(equal(*p) for p in pairs):
            return False
        require_no_nan(self._kernel, groups)
        self._merge_parts(groups)
        self._guard.take(groups)
        return True

    def _rest_still(self, params: Sequence[Tensor]) -> bool:
        mine = self._rest_of(params)
        places, layouts = list(map(_place_of, mine)), _layouts_of(mine)
        return places == self._rest_places and layouts == self._rest_layouts

    def _proved(
        self, whole: list[Any], there: list[bool] | None, look: bool = False
    ) -> Grads | None:
        """Return the gradients if all is as planned, by guards or by a look at each."""
        local = whole
        if self._plain < self._count:
            try:
                if not self._shards_still(whole):
                    return None
                shards = _torch.local_tensors(whole[self._plain :])
            except AttributeError:  # a gradient is None, or not sharded where it was
                return None
            local = [*whole[: self._plain], *shards]
        tensors = self._walked(local)
        if not self._tensors.holds(tensors):
            # Not checked yet, or in another dispatch state: check once, and remember.
            if not look or not all(b.fits(local[b.part]) for b in self._buckets):
                return None
            self._tensors.admit(tensors)
        return Grads(local, there)

    def _walked(self, local: list[Any]) -> tuple[Tensor, ...]:
        """List the tensors to look at; state unseen is what the last step left."""
        seen = (*self._moments, *self._steps) if self._exposed else ()
        return (*self._local, *local, *seen)

    def _shards_still(self, whole: list[Any]) -> bool:
        assert self._active is not None  # gathered
        part = slice(self._plain, self._count)
        params, grads = self._active[part], whole[part]
        if not same_objects(_torch.local_tensors(params), self._local[part]):
            return False
        # DTensor makes few specs and shares them, so that identity is quick to hold.
        specs = _torch.specs_of(grads)
        if same_objects(specs, self._specs):
            return True
        where = map(_torch.placement, params)
        if not all(map(eq, where, map(_torch.placement, grads))):
            return False
        self._specs = specs
        return True

    # Running.

    def run(self, grads: Grads, scaling: Scaling) -> None:
        """Step every bucket; counters advance before and fall back if skipped."""
        scaled = cache(partial(scaling_on, scaling))  # moved to each device once
        # Into the lists that calls are bound to, and out of them in any case: gradients
        # that the user sets to None must be freed.
        for bucket in self._buckets:
            bucket.batch.grads[:] = grads.local[bucket.part]
        try:
            program = self._program
            steady = scaling == NO_SCALING and grads.there is None and not self._live
            if program is None or not steady:
                # Scales, absent gradients and tensor rates are of this step alone.
                program = self._assemble(grads.there, scaling, scaled)
                self._program = program if steady else None
            self._perform(program, scaled)
        finally:
            for bucket in self._buckets:
                bucket.batch.grads.clear()
            if not self._keeps:
                self._release()

    def _assemble(
        self, there: list[bool] | None, scaling: Scaling, scaled: OnDevice
    ) -> Program:
        advance = self._advance if there is None else self._advance_of(there)
        calls: list[Call] = []
        ends = []
        single = False
        for bucket in self._buckets:
            batch = bucket.present(there)
            if batch.params:
                # Threads are set where they change, not around every call.
                if bucket.single_thread != single:
                    single = bucket.single_thread
                    calls.append(self._on(1 if single else self._threads))
                calls += bucket.calls(batch, scaled(bucket.key.device))
            ends.append(len(calls))
        if single:
            calls.append(self._on(self._threads))
        dropping = scaling.found_inf is not None
        return Program(
            before=advance.by(lambda device: 1.0),
            calls=calls,
            ends=ends,
            after=advance.by(lambda d: -scaled(d).found_inf) if dropping else [],
            threads=self._threads if any(b.single_thread for b in self._buckets) else 0,
            lasting=advance.lasting and not any(map(_holds_a_tensor, calls)),
        )

    @staticmethod
    def _on(threads: int) -> Call:
        assert _torch.set_threads is not None  # or no bucket is of one thread
        return partial(_torch.set_threads, threads)

    def _advance_of(self, there: list[bool]) -> Advance:
        """Find out how the counters advance of those that have a gradient."""
        if self._present is None or self._present[0] != there:
            steps = list(compress(self._steps, there))
            self._present = there, self._counters.advance(steps)
        return self._present[1]

    def _perform(self, program: Program, scaled: OnDevice) -> None:
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
                self._take_back(program, done, scaled)
            raise

    def _take_back(self, program: Program, done: int, scaled: OnDevice) -> None:
        """Let the counters of buckets that a failed call left out stand as before."""
        if done < 0:  # it was a counter that failed
            return
        for call in program.after:
            call()
        for bucket, end in zip(self._buckets, program.ends):
            if end > done and bucket.batch.steps:
                dropped = scaled(bucket.key.device).found_inf
                amount = -1.0 if dropped is None else dropped - 1.0
                _torch.foreach_add_(bucket.batch.steps, amount)
