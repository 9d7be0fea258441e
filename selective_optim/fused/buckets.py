"""Which of the fused parts share a kernel call, and the first state of all.

What the hyperparameters of its group are does not matter to a part, so that it outlives
a changing learning rate. Parts of equal hyperparameters make a bucket, which is one
call.

Adding one to 1,000 separate step counters takes a fifth of what the fused kernel takes
for 1,000 small parameters; adding it to one tensor that they view, nothing. But a
view is no tensor of its own: it pickles with all that it views, cannot be detached,
and its storage is everybody's. So counters that a step makes are views only until
someone reads the state. Then each becomes a tensor of its own, as in torch, and
advances by itself from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import compress
from operator import attrgetter

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.fused.guards import flat
from selective_optim.step.decay_passes import pass_calls
from selective_optim.step.kernels import Kernel
from selective_optim.step.parts import DecidedParam, Part, counts_beside, fusable, joins
from selective_optim.step.setting import Batch, Call, Groups, Scaling, Setting, States

Amount = Callable[[torch.device], float | Tensor]
_device_of = attrgetter("device")


def begin_state(
    kernel: Kernel,
    groups: Groups,
    parts: Sequence[Part],
    params: Sequence[DecidedParam],
    states: States,
    counters: Counters,
) -> None:
    """Make the state of fused parameters that have none, as torch makes it.

    Counters may share one tensor per device.
    """
    mine = {number for part in parts for number in part.positions}
    new: dict[int, DecidedParam] = {}
    for number in sorted(mine):
        each = params[number]
        if not kernel.has_state(states.get(each.param) or {}, groups[each.group]):
            new.setdefault(id(_torch.token_of(each.param)), each)
    shared: dict[torch.device, Iterator[Tensor]] = {}
    devices = [each.param.device for each in new.values()]
    for device in dict.fromkeys(devices) if counters.joining else ():
        # Room for those that train and have no gradient yet, as an unused head: another
        # block would be another call.
        later = sum(
            p.param.device == device and p.param.requires_grad and p.param.grad is None
            for p in params
        )
        shared[device] = iter(counters.reserve(device, devices.count(device), later))
    for each in new.values():
        step = next(shared[each.param.device]) if shared else None
        kernel.begin(states[each.param], each.param, groups[each.group], step)


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
        self.key, self.label = parts[0].key, parts[0].label
        # Of its parameters, among all of all groups, and among those of a plan.
        self.positions: list[int] = flat(part.positions for part in parts)
        self.part = slice(start, start + len(self.positions))
        self.inits: list[Tensor] = flat(part.inits for part in parts)
        # In the order in which torch asks for them, and misses one that is gone.
        self.entries = (*entries, "step") if kernel.counts else entries
        self.batch = Batch([], [[] for _ in entries], [])

    def load(
        self, part: slice, params: list[Tensor], columns: Sequence[list[Tensor]]
    ) -> None:
        """Take in this bucket's part of the tensors of the steps to come."""
        batch = self.batch
        batch.params[:] = params[part]
        for mine, column in zip((*batch.moments, batch.steps), columns):
            mine[:] = column[part]
        sharded = self.key.sharded
        batch.targets[:] = _torch.local_tensors(self.inits) if sharded else self.inits

    def unload(self) -> None:
        """Let go of all tensors."""
        batch = self.batch
        for mine in (batch.params, *batch.moments, batch.steps, batch.targets):
            mine.clear()

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


class Block:
    """One tensor and the counters that view it, handed out in order."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.flat = torch.zeros(size, dtype=torch.float32, device=device)
        self.taken = 0

    def take(self, count: int) -> list[Tensor]:
        """Hand out counters that stand at 0, as many as are left at most."""
        count = min(count, len(self.flat) - self.taken)
        # Not a slice: indexing asks for the device itself, which fake tensors lack.
        part = self.flat.narrow(0, self.taken, count)
        self.taken += count
        return list(part.zero_().unbind())  # they advanced with the others

    def place_of(self, counter: Tensor) -> int | None:
        """Tell which element a tensor views, if any: memory tells, not identity."""
        if counter.device != self.flat.device or counter.dtype != self.flat.dtype:
            return None
        try:
            offset = counter.data_ptr() - self.flat.data_ptr()
        except RuntimeError:  # a fake tensor has no memory
            return None
        inside = 0 <= offset < 4 * self.taken
        return offset // 4 if inside else None


class Advance:
    """How a list of counters advances: whole blocks, parts of them, single ones."""

    def __init__(self, blocks: Sequence[Block], counters: list[Tensor]) -> None:
        self._whole: list[Tensor] = []
        self._partial: list[tuple[Tensor, Tensor]] = []
        # The caller's own list, in which other counters may come to stand.
        self._single: list[Tensor] = [] if blocks else counters
        self.lasting = not blocks and len(set(map(_device_of, counters))) < 2
        # Beside views stand counters of their own, as that of a parameter whose first
        # gradient was stepped another way.
        places: dict[int, list[int]] = {}
        for counter in counters if blocks else ():
            known = (
                (i, place)
                for i, block in enumerate(blocks)
                if (place := block.place_of(counter)) is not None
            )
            found = next(known, None)
            if found is None:
                self._single.append(counter)
            else:
                places.setdefault(found[0], []).append(found[1])
        self.blocks = [blocks[i] for i in places]
        for i, mine in places.items():
            self._advance(blocks[i], mine)

    def _advance(self, block: Block, places: list[int]) -> None:
        if len(set(places)) == len(places) == block.taken:
            self._whole.append(block.flat)
        elif block.flat.is_cpu:
            amounts = torch.zeros(len(block.flat), dtype=torch.float32, device="cpu")
            for place in places:  # a parameter that is listed twice steps twice
                amounts[place] += 1
            self._partial.append((block.flat, amounts))
        else:  # amounts would have to be copied to the device, also during a capture
            self._single += [block.flat.select(0, place) for place in places]

    def by(self, amount: Amount) -> list[Call]:
        """Return the calls that add an amount, asked for by device, to each counter."""
        calls: list[Call] = [
            partial(block.add_, amount(block.device)) for block in self._whole
        ]
        for block, times in self._partial:
            calls.append(partial(block.add_, times * amount(block.device)))
        if self.lasting:
            mine = self._single
            return [_torch.adding(mine, amount(mine[0].device))] if mine else []
        by_device: dict[torch.device, list[Tensor]] = {}
        for device, counter in zip(map(_device_of, self._single), self._single):
            by_device.setdefault(device, []).append(counter)
        for device, mine in by_device.items():
            calls.append(_torch.adding(mine, amount(device)))
        return calls


class Counters:
    """The blocks of counters of one optimizer."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._viewed = False  # whether any counter may be a view, also of a block gone
        # Whether counters may be views: nobody outside sees them, and no CUDA graph
        # remembers where they lie.
        self.joining = True

    def reserve(self, device: torch.device, now: int, later: int) -> list[Tensor]:
        """Make ``now`` counters that view one tensor; ``later`` more may begin."""
        self._viewed = True
        mine = [block for block in self._blocks if block.flat.device == device]
        made: list[Tensor] = []
        for block in mine:
            made += block.take(now - len(made))
        if missing := now - len(made):
            self._blocks.append(Block(device, missing + later))
            made += self._blocks[-1].take(missing)
        return made

    def part(self, states: States, seen: bool = False) -> None:
        """Make each counter a tensor of its own, in place if it may have been seen."""
        if self._viewed:
            # Or the new ones could not be written to outside of it.
            with torch.inference_mode(False):
                for own in states.values():
                    step = own.get("step")
                    if isinstance(step, Tensor) and seen:
                        step.data = step.clone()
                    elif isinstance(step, Tensor):
                        own["step"] = step.clone()
        self._blocks, self._viewed, self.joining = [], False, False

    def advance(self, counters: list[Tensor]) -> Advance:
        """Find out how these advance together."""
        return Advance(self._blocks, counters)

    def keep(self, advance: Advance) -> None:
        """Forget blocks that no counter of a plan views.

        Counters that are left in one, of parameters that do not step now, go on alone.
        """
        self._blocks = [
            block
            for block in self._blocks
            if block in advance.blocks or block.taken < len(block.flat)
        ]
