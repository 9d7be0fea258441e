"""The accelerator: every fused kernel call of a step, planned once and replayed.

A plan is given tensors and numbers and knows no policy. It proves at every step that
the layout of the parts still holds, also of those that the class steps.

What the hyperparameters of its group are does not matter to a part, so that it outlives
a changing learning rate. Parts of equal hyperparameters make a bucket, which is one
call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import compress, groupby
from operator import attrgetter, eq, is_not, length_hint, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.fused.counters import Advance, Counters, by_device
from selective_optim.fused.guards import (
    GroupsGuard,
    distinct,
    equal,
    flat,
    grads_of,
    params_of,
    same_objects,
)
from selective_optim.step.decay_passes import pass_calls
from selective_optim.step.kernels import Kernel, require_no_nan
from selective_optim.step.parts import Layout, Part, counts_beside, fusable, joins
from selective_optim.step.setting import (
    NO_SCALING,
    PLAIN,
    Batch,
    Call,
    Groups,
    Scaling,
    Setting,
    States,
    picker,
    scaling_on,
)

# Dispatch states, such as with and without autocast, for each of which a proof is kept.
PROOFS = 4
_GRAD_OFF = partial(_torch.set_grad_enabled, False)
_GRAD_ON = partial(_torch.set_grad_enabled, True)
_call = methodcaller("__call__")
_is_there = partial(is_not, None)
_traits = attrgetter("dtype", "device", "grad.layout")


class Program(NamedTuple):
    """The calls of one step over the buckets, in order."""

    before: list[Call]  # advance the counters
    calls: list[Call]  # step the buckets
    ends: list[int]  # for each bucket, how many of ``calls`` have run when it is done
    after: list[Call]  # take the counters back where a scaler drops the step


def _traits_of(params: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """List what sends parameters to their class; absent gradients pass for dense."""
    try:
        return list(map(_traits, params))  # all in C
    except AttributeError:
        grads = grads_of(params)
        layouts = [torch.strided if grad is None else grad.layout for grad in grads]
        return [(p.dtype, p.device, layout) for p, layout in zip(params, layouts)]


class Bucket:
    """Parts of equal settings, stepped by one call of torch's fused kernel.

    The lists of ``batch`` stay, and so do calls that are bound to them; tensors are in
    them for the time that they are at hand.
    """

    setting: Setting
    single_thread: bool  # whether one thread is to run the call

    def __init__(
        self,
        kernel: Kernel,
        parts: Sequence[Part],
        entries: tuple[str, ...],
        start: int,
    ) -> None:
        self._kernel = kernel
        self.key = parts[0].key
        # Of its parameters, among all of all groups, and among those of a plan.
        self.positions: list[int] = flat(part.positions for part in parts)
        self.part = slice(start, start + len(self.positions))
        inits: list[Tensor] = flat(part.inits for part in parts)
        targets = _torch.local_tensors(inits) if self.key.sharded else inits
        # In the order in which torch asks for them, and misses one that is gone.
        self.entries = (*entries, "step") if kernel.counts else entries
        self.batch = Batch([], [[] for _ in entries], [], targets)

    @property
    def lists(self) -> list[list[Any]]:
        """What is filled for a step: parameters, and their state entry by entry."""
        batch = self.batch
        return [batch.params, *batch.moments, batch.steps][: 1 + len(self.entries)]

    def fits(self, grads: Sequence[Tensor]) -> bool:
        """Look at every tensor, one by one: can the fused kernel walk it?"""
        batch = self.batch
        alike = all(
            param.dtype == self.key.dtype
            and param.device == self.key.device
            and fusable(self._kernel, param, moments)
            and joins(param, grad)
            for param, grad, *moments in zip(batch.params, grads, *batch.moments)
        )
        return alike and all(map(counts_beside, batch.params, batch.steps))

    def present(self, there: Sequence[bool] | None) -> Batch:
        """Keep the parameters that have a gradient."""
        if there is None or all(mine := there[self.part]):
            return self.batch
        own = self.batch
        lists = (own.params, own.steps, own.targets, own.grads, *own.moments)
        kept = [list(compress(tensors, mine)) for tensors in lists]
        params, steps, targets, grads, *moments = kept
        return Batch(params, moments, steps, targets, grads)

    def calls(self, batch: Batch, scaling: Scaling) -> list[Call]:
        """Return calls that step a batch, whose lists are read when the calls run."""
        kernel, setting = self._kernel, self.setting
        calls: list[Call] = []
        if (decay_pass := setting.share.decay_pass) is not None:
            own = setting.arguments
            calls, scaling = pass_calls(
                *(decay_pass, own["lr"], own["maximize"], batch),
                *(partial(kernel.direction, setting), scaling),
            )
        return [*calls, kernel.fused_call(setting, batch, scaling)]


class Run:
    """Neighbors whose state has the same entries, which one walk gathers."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        start = buckets[0].part.start
        self.entries, self.sharded = buckets[0].entries, buckets[0].key.sharded
        self.part = slice(start, buckets[-1].part.stop)
        parts = [bucket.part for bucket in buckets]
        self.slices = [slice(p.start - start, p.stop - start) for p in parts]
        # By column: parameters, then each entry.
        self.lists = list(zip(*(bucket.lists for bucket in buckets)))


def _fill(
    lists: Iterable[list[Any]], items: Sequence[Any], slices: Iterable[slice]
) -> None:
    deque(map(list.extend, lists, map(items.__getitem__, slices)), maxlen=0)


def _clear(lists: Iterable[list[Any]]) -> None:
    deque(map(list.clear, lists), maxlen=0)


class Plan:
    """The parts of a step, and the kernel calls of those that are fused.

    Where someone outside may edit the state (``exposed``), a plan keeps no tensor
    between steps: what is replaced or cleared is freed at once.
    """

    def __init__(
        self,
        kernel: Kernel,
        groups: Groups,
        layout: Layout,
        states: States,
        counters: Counters,
        exposed: bool,
    ) -> None:
        self._kernel = kernel
        self._counters = counters
        self._exposed = exposed
        self.once = layout.once
        fused = [part for part in layout.parts if part.key.planned]
        # What the optimizer's own class steps.
        self.rest = [part for part in layout.parts if not part.key.planned]
        # Plain ones first; among both, those that take all threads.
        self._parts = sorted(fused, key=lambda p: (p.key.sharded, p.key.single_thread))
        self._some_single = any(part.key.single_thread for part in fused)
        # Parameters in no part had no gradient yet; their first one needs a new plan.
        self._idle_of = picker(layout.idle)
        self._rest_of = picker(flat(part.positions for part in self.rest))
        self._beside = bool(layout.idle or self.rest)
        params = params_of(groups)
        self._rest_traits = _traits_of(self._rest_of(params))
        self._some_sparse = any(t[-1] != torch.strided for t in self._rest_traits)
        self._rest_proof: Callable[..., bool] = lambda *grads: False
        self._structure = list(map(kernel.structure, groups))
        # What the state holds lives as long as the optimizer, and is kept alive by
        # nothing here. Plain SGD has no state, and releases tensors after each step.
        mine = {i for part in fused for i in part.positions}
        self._keeps = not exposed and all(params[i] in states for i in mine)
        held = self._keeps and all(param in states for param in params)
        self._guard = GroupsGuard(groups, params, held=held)
        self._new = True  # the layout has just looked at all
        self._merged: list[list[Part]] | None = None
        self._merge_parts(groups)
        self._gather(params, states)

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
        self._plain = self._count = 0
        for parts in merged:
            key = parts[0].key
            entries = self._kernel.entries(groups[key.group])
            bucket = Bucket(self._kernel, parts, entries, self._count)
            self._buckets.append(bucket)
            self._count = bucket.part.stop
            if not key.sharded:
                self._plain = self._count
        self._order = picker(flat(bucket.positions for bucket in self._buckets))
        self._slices = [bucket.part for bucket in self._buckets]
        self._grads = [bucket.batch.grads for bucket in self._buckets]
        alike = groupby(self._buckets, lambda b: (b.entries, b.key.sharded))
        self._runs = [Run(list(buckets)) for _, buckets in alike]
        self._specs: list[Any] = []
        self._there: list[bool] | None = None  # which gradients, if some are absent
        self._proofs: list[Callable[..., bool]] = []
        # The lists stay, as those of buckets do, and calls that are bound to them.
        self._local: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._seen: list[Tensor] = []  # of the state that others may edit
        lists = (each for bucket in self._buckets for each in bucket.lists)
        self._filled = [self._local, self._steps, self._seen, *lists, *self._grads]
        self._active: Sequence[Tensor] | None = None

    def _gather(self, params: Sequence[Tensor], states: States) -> None:
        _clear(self._filled)  # an interrupt may have left something
        active = self._order(params)
        for run in self._runs:
            self._load(run, active, states)
        if self._exposed and self._steps and distinct(self._steps) < distinct(active):
            raise KeyError("a step counter of its own")
        if self._program is None:
            self._advance = self._counters.advance(self._steps)
        self._active = active

    def _load(self, run: Run, active: Sequence[Tensor], states: States) -> None:
        params = active[run.part]
        columns: list[Sequence[Tensor]] = [params]
        if run.entries:
            owns = [states.get(param) or {} for param in params]
            columns += [[own[entry] for own in owns] for entry in run.entries]
        if run.sharded:
            split = len(columns) - self._kernel.counts
            columns[:split] = map(_torch.local_tensors, columns[:split])
        for lists, column in zip(run.lists, columns):
            _fill(lists, column, run.slices)
        self._local += columns[0]
        self._steps += columns[-1] if self._kernel.counts else []
        self._seen += flat(columns[1:]) if self._exposed else []

    def _release(self) -> None:
        self._active = None
        _clear(self._filled)

    # Checking: is the plan still valid?

    def current_grads(self, groups: Groups, states: States) -> list[Any] | None:
        """Take over new numbers; return gradients if the plan is still true."""
        told = self._active is not None and self._guard.lists_tell
        params = [] if told and not self._beside else params_of(groups)
        if self._fleeting or not self._guard.holds(groups, params):
            if not self._reread(groups, params or params_of(groups)):
                return None
        elif self._some_single and _torch.thread_count() != self._threads:
            self._merge_parts(groups)
        if self._beside:
            idle, rest = self._idle_of(params), self._rest_of(params)
            if any(map(_is_there, grads_of(idle))) or not self._rest_stays(rest):
                return None
        if not self._buckets:
            return []
        if self._active is None:
            try:
                self._gather(params or params_of(groups), states)
            except (KeyError, AttributeError, TypeError):
                return None  # an entry is gone, or no tensor: torch's words say it
        return self.find_grads()

    def _rest_stays(self, params: Sequence[Tensor]) -> bool:
        """Tell whether what the class steps would go to it again."""
        # Gradients move with their parameters, and looking at them takes half as long.
        grads = grads_of(params)
        if self._rest_proof(*grads):
            return True
        if _traits_of(params) != self._rest_traits:
            return False
        if not self._some_sparse and {*PLAIN}.issuperset(map(type, grads)):
            self._rest_proof = _torch.tensor_proof(grads)
        return True

    def find_grads(self) -> list[Any] | None:
        """Return gradients, local and in a plan's order, if they are as planned."""
        assert self._active is not None  # gathered
        whole = grads_of(self._active)
        if self._there is None and (local := self._proved(whole)) is not None:
            return local
        there = [grad is not None for grad in whole]
        self._there = None if all(there) else there
        filled = [
            param.detach() if grad is None else grad
            for param, grad in zip(self._active, whole)
        ]
        return self._proved(filled, look=True)

    @torch.no_grad()
    def _reread(self, groups: Groups, params: Sequence[Tensor]) -> bool:
        """Take over new hyperparameters; not where the parts depend on them."""
        if not self._guard.holds_params(groups, params) or self._some_sparse:
            return False
        for part in self.rest:
            part.view = None
        structure = list(map(self._kernel.structure, groups))
        # An unknown key may be one for which the step raises.
        if not self._guard.holds_keys(groups) or not equal(structure, self._structure):
            return False
        require_no_nan(self._kernel, groups)
        self._merge_parts(groups)
        self._guard.take(groups)
        return True

    def _proved(self, whole: list[Any], look: bool = False) -> list[Any] | None:
        """Return local gradients if all is as planned, by guards or a look at each.

        A look is remembered, for each dispatch state.
        """
        local = whole
        if self._plain < self._count:
            try:
                if not self._new and not self._shards_still(whole):
                    return None
                shards = _torch.local_tensors(whole[self._plain :])
            except AttributeError:  # a gradient is None, or not sharded where it was
                return None
            local = [*whole[: self._plain], *shards]
        # State that nobody else may edit is what the last step left.
        tensors = (*self._local, *local, *self._seen)
        if not any(proof(*tensors) for proof in self._proofs):
            buckets = () if self._new else self._buckets
            if not look or not all(b.fits(local[b.part]) for b in buckets):
                return None
            if tensors and not self.once:
                self._proofs = [_torch.tensor_proof(tensors), *self._proofs][:PROOFS]
        self._new = False
        return local

    def _shards_still(self, whole: list[Any]) -> bool:
        assert self._active is not None  # gathered
        params, grads = self._active[self._plain :], whole[self._plain :]
        if not same_objects(_torch.local_tensors(params), self._local[self._plain :]):
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

    def run(self, grads: list[Any], scaling: Scaling) -> None:
        """Step every bucket; counters advance before and fall back if skipped."""
        try:
            # Into the lists that calls are bound to, and out of them in any case:
            # gradients that the user sets to None must be freed.
            _fill(self._grads, grads, self._slices)
            program = self._program
            steady = scaling is NO_SCALING and self._there is None and not self._live
            if program is None or not steady:
                # Scales, absent gradients and tensor rates are of this step alone.
                program = self._assemble(scaling)
                lasts = steady and (self._keeps or self._lasts(program))
                self._program = program if lasts else None
            self._perform(program, scaling)
        finally:
            if self._keeps:
                _clear(self._grads)
            else:
                self._release()

    @torch.no_grad()
    def _assemble(self, scaling: Scaling) -> Program:
        # Moved to each device once.
        scaled: Callable[..., Any] = cache(partial(scaling_on, scaling))
        advance = self._advance
        if self._there is not None:
            present = list(compress(self._steps, self._there))
            advance = Advance([], by_device(present))
        calls: list[Call] = []
        ends = []
        single = False
        for bucket in self._buckets:
            batch = bucket.present(self._there)
            if batch.params:
                # Threads are set where they change, not around every call.
                if bucket.single_thread != single:
                    single = bucket.single_thread
                    threads = 1 if single else self._threads
                    calls.append(partial(_torch.set_threads, threads))
                calls += bucket.calls(batch, scaled(bucket.key.device))
            ends.append(len(calls))
        if single:
            calls.append(partial(_torch.set_threads, self._threads))
        dropping = scaling.found_inf is not None
        after = advance.by(lambda d: -scaled(d).found_inf) if dropping else []
        return Program(advance.by(lambda device: 1.0), calls, ends, after)

    def _lasts(self, program: Program) -> bool:
        """Tell whether calls are bound to lists alone, which may be empty by then."""
        bound = [getattr(call, "args", None) for call in program.calls]
        return (
            not self._advance.whole
            and all(each is self._steps for each in self._advance.single)
            and not any(args and isinstance(args[0], Tensor) for args in bound)
        )

    def _perform(self, program: Program, scaling: Scaling) -> None:
        """Run all calls without a line of Python between them.

        Python looks for signals between lines: an interrupt comes before the first
        call or after the last, and never between a counter and its parameters.
        """
        back = _GRAD_ON if torch.is_grad_enabled() else _GRAD_OFF
        calls = (*program.before, *program.calls, *program.after)
        left = iter((_GRAD_OFF, *calls, back))  # `back` is left where a call failed
        try:
            deque(map(_call, left), maxlen=0)
        except BaseException:
            back()
            if self._some_single and self._threads > 1:
                _torch.set_threads(self._threads)
            if rest := length_hint(left):
                done = len(program.calls) + len(program.after) - rest
                self._take_back(program, done, scaling)
            raise

    def _take_back(self, program: Program, done: int, scaling: Scaling) -> None:
        """Let the counters of buckets that a failed call left out stand as before."""
        if done < 0:  # it was a counter that failed
            return
        for call in program.after:
            call()
        for bucket, end in zip(self._buckets, program.ends):
            if end > done and bucket.batch.steps:
                dropped = scaling_on(scaling, bucket.key.device).found_inf
                amount = -1.0 if dropped is None else dropped - 1.0
                _torch.foreach_add_(bucket.batch.steps, amount)
