"""One kernel call: the parameters that go into it, and their tensors while at hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from torch import Tensor

from selective_optim import _torch
from selective_optim.fused.cells import Cell
from selective_optim.fused.guards import flat
from selective_optim.step.implementation import counts_beside, fusable, joins
from selective_optim.step.kernel import Kernel
from selective_optim.step.setting import Batch, Setting

Lists = Sequence[list[Tensor]]


class Bucket:
    """Cells of equal settings, stepped by one call of torch's fused kernel.

    ``positions`` number its parameters among all of all groups; ``part`` says which
    of a plan's parameters are its own; ``entries`` names their state. The lists of
    ``batch`` stay, and so do calls that are bound to them; tensors are in them for the
    time that they are at hand.
    """

    def __init__(
        self,
        kernel: Kernel,
        cells: Sequence[Cell],
        entries: tuple[str, ...],
        start: int,
    ) -> None:
        self._kernel = kernel
        self.key, self.label = cells[0].key, cells[0].label
        self.positions: list[int] = flat(cell.positions for cell in cells)
        self.inits: list[Tensor] = flat(cell.inits for cell in cells)
        self.part = slice(start, start + len(self.positions))
        # In the order in which torch asks for them, and misses one that is gone.
        self.entries = (*entries, "step") if kernel.counts else entries
        self.batch = Batch([], [[] for _ in entries], [])

    def take(self, setting: Setting, single_thread: bool) -> None:
        """Take over hyperparameters, and whether one thread is to run the call."""
        self.setting, self.single_thread = setting, single_thread

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
