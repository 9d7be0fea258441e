"""What only steps show, and is told once: each watch looks on until it has an answer.

A watch is called at the end of a step, when every tensor has its row. It tells whether
it is done.
"""

from __future__ import annotations

from collections.abc import Sequence

from selective_optim import _torch
from selective_optim._warnings import (
    warn_of_decay_taken_over,
    warn_of_high_rate,
    warn_of_rounding,
)
from selective_optim.decay import FULL, Decision, is_zero
from selective_optim.decisions.initial_values import is_rate, rate_now
from selective_optim.decisions.table import Group, Row
from selective_optim.step.half_precision import first_loser
from selective_optim.step.kernel import Kernel
from selective_optim.step.parts import decided_params

Layout = Sequence[Sequence[Row]]
IDLE = 2  # steps without decay that are none of a schedule
IN_A_ROW = 10  # steps above the first rate
ABOVE = 1 + 1e-6  # times that; schedules come back to it with an error of rounding


def _moves(groups: Sequence[Group]) -> bool:
    """Tell whether a rate is above 0, as one on a device is taken to be."""
    rates = map(rate_now, groups)
    return any(rate is None or rate > 0 for rate in rates)


class HalfPrecision:
    """Whether half precision rounds decay away; asked once."""

    def __call__(
        self, groups: Sequence[Group], layout: Layout, kernel: Kernel | None
    ) -> bool:
        decided = [[row.decision for row in rows] for rows in layout]
        params = decided_params(groups, decided)
        devices = {each.param.device for each in params}
        if not _moves(groups) or any(map(_torch.is_capturing, devices)):
            return False
        if loser := first_loser(kernel, groups, params):
            warn_of_rounding(loser.label, loser.param.dtype)
        return True


class TakenOver:
    """Whether a wrapper sets decay to 0 and applies it by itself."""

    _idle = 0

    def __call__(
        self, groups: Sequence[Group], layout: Layout, kernel: Kernel | None
    ) -> bool:
        if not _moves(groups):
            return False
        if any(map(_decays, groups, layout)):
            return True
        self._idle += 1
        if self._idle < IDLE:
            return False
        rows = [row for rows in layout for row in rows]
        departing = [row.policy for row in rows if row.decision.decay != FULL]
        if policy := next(filter(None, departing), None):
            warn_of_decay_taken_over(policy)
        return True


def _decays(group: Group, rows: Sequence[Row]) -> bool:
    wd = group["weight_decay"]
    return not (is_zero(wd) and all(is_zero(row.decision.decay.of(wd)) for row in rows))


class HighRate:
    """Whether a rate rises above the one that decay is divided by."""

    _layout: Layout = ()

    def __call__(
        self, groups: Sequence[Group], layout: Layout, kernel: Kernel | None
    ) -> bool:
        if layout is not self._layout:  # whenever anything moved
            self._layout, self._divided = layout, list(map(_divided, layout))
            self._above = [0] * len(layout)
        for index, (group, decision) in enumerate(zip(groups, self._divided)):
            lr0 = decision and decision.lr0
            if decision and lr0 and (top := self._risen(index, group, lr0 * ABOVE)):
                warn_of_high_rate(index, decision.decay.form, lr0, top)
                return True
        return not any(self._divided)

    def _risen(self, index: int, group: Group, limit: float) -> float | None:
        """Return the rate that is above the limit, if not for a moment."""
        rate, top = rate_now(group) or 0.0, group.get("max_lr")
        self._above[index] = self._above[index] + 1 if rate > limit else 0
        if top is not None and is_rate(top) and top > limit:
            return float(top)
        return rate if self._above[index] >= IN_A_ROW else None


def _divided(rows: Sequence[Row]) -> Decision | None:
    """Return the decision of a group that divides by the smallest rate."""
    divided = [row.decision for row in rows if row.decision.decay.needs_lr0]
    return min(divided, key=lambda each: each.lr0 or 0.0, default=None)
