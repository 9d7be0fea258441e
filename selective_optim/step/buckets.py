"""One kernel call: the parameters that go into it, and their tensors while at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import accumulate, compress, pairwise, starmap
from typing import Any

from torch import Tensor

from selective_optim import _torch
from selective_optim.step.cells import Cell, Key
from selective_optim.step.fused import counts_beside, fusable, joins
from selective_optim.step.grad_scaler import Scaling, step_unless, unscale_
from selective_optim.step.guards import flat
from selective_optim.step.kernel import Kernel
from selective_optim.step.setting import Batch, Setting, State, States

Lists = Sequence[list[Tensor]]


class Bucket:
    """Cells of equal settings, stepped by one call.

    ``positions`` number its parameters among all of all groups; ``part`` says which
    of a plan's parameters are its own; ``entries`` names their state.
    """

    def __init__(
        self,
        kernel: Kernel,
        cells: Sequence[Cell],
        entries: tuple[str, ...],
        start: int,
    ) -> None:
        self._kernel, self._cells = kernel, cells
        self.key: Key = cells[0].key
        self.label = cells[0].label
        self.positions: list[int] = flat(cell.positions for cell in cells)
        self.inits: list[Tensor] = flat(cell.inits for cell in cells)
        self.part = slice(start, start + len(self.positions))
        # In the order in which torch asks for them, and misses one that is gone.
        self.entries = (*entries, "step") if kernel.counts else entries

    def take(self, setting: Setting, alone: bool) -> None:
        """Take over hyperparameters, and whether one thread is to run the call."""
        self.setting, self.alone = setting, alone


class FusedBucket(Bucket):
    """Parameters that torch's fused kernel steps, on their tensors or shards.

    The lists of ``batch`` stay, and so do calls that are bound to them; tensors are in
    them for the time that they are at hand.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        moments = len(self.entries) - self._kernel.counts
        self.batch = Batch([], [[] for _ in range(moments)], [])

    def load(self, part: slice, params: list[Tensor], columns: Lists) -> None:
        """Take in the tensors of the steps to come.

        Args:
            part: Which of the tensors are this bucket's.
            params: As the kernel gets them.
            columns: The tensors of each state entry.
        """
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
        rows = zip(self.batch.params, grads, *self.batch.moments, strict=True)
        alike = all(
            param.dtype == self.key.dtype
            and param.device == self.key.device
            and fusable(self._kernel, param, moments)
            and joins(param, grad)
            for param, grad, *moments in rows
        )
        counted = zip(self.batch.params, self.batch.steps)
        return alike and all(counts_beside(param, step) for param, step in counted)

    def present(self, there: Sequence[bool] | None) -> Batch:
        """Keep the parameters that have a gradient."""
        if there is None or all(mine := there[self.part]):
            return self.batch

        def kept(tensors: list[Tensor]) -> list[Tensor]:
            return list(compress(tensors, mine))

        own = self.batch
        moments = [kept(moment) for moment in own.moments]
        steps, targets, grads = kept(own.steps), kept(own.targets), kept(own.grads)
        return Batch(kept(own.params), moments, steps, targets, grads)


class FunctionalBucket(Bucket):
    """Parameters that go through torch's functional: for-loop, foreach, or fused."""

    @cached_property
    def _groups(self) -> list[slice]:
        """Which of its parameters are of one parameter group; cells come so sorted."""
        sizes: Counter[int] = Counter()
        for cell in self._cells:
            sizes[cell.key.group] += len(cell.positions)
        return list(starmap(slice, pairwise([0, *accumulate(sizes.values())])))

    def step(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        there: Sequence[bool],
        states: States,
        scaling: Scaling,
    ) -> None:
        """Step those that have a gradient, or none where infinity was found."""
        # Several groups go in one call; not where momentum begins in one: in half
        # precision foreach then rounds otherwise, for that group, as in torch.
        beginning = not self._kernel.counts and not self._have_begun(
            [states.get(param) or {} for param in compress(params, there)]
        )
        for part in self._groups if beginning else [slice(None)]:
            own = params[part], grads[part], self.inits[part], there[part]
            self._step_present(*own, states, scaling)

    def _have_begun(self, owns: Sequence[State]) -> bool:
        return all(own.get(entry) is not None for own in owns for entry in self.entries)

    def _step_present(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        inits: Sequence[Tensor],
        there: Sequence[bool],
        states: States,
        scaling: Scaling,
    ) -> None:
        present, theirs, targets = (
            list(compress(each, there)) for each in (params, grads, inits)
        )
        if not present:
            return
        owns = [states[p] if self.entries else {} for p in present]
        if scaling.grad_scale is not None:
            unscale_(theirs, scaling.grad_scale)
        functional = self._kernel.functional
        step = partial(functional, self.setting, present, theirs, owns, targets)
        if scaling.found_inf is None:
            step()
            return
        touched: list[Tensor] | None = None
        if self._have_begun(owns):
            touched = [*present, *(own[e] for own in owns for e in self.entries)]
        step_unless(scaling.found_inf, step, touched)
