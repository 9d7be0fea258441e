"""Warnings that need a step: decay that is lost, or divided by too small a rate.

A weight in half precision moves by whole units in the last place. The fused kernels of
Adam round decay and update together, so that noise of the update carries a decay over
that alone is too small. Elsewhere decay is rounded alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._warnings import warn, warn_of_decay_taken_over, warn_of_high_rate
from selective_optim.decay import FORMS, FULL, Decision, is_zero
from selective_optim.decisions.initial_values import is_rate, rate_now
from selective_optim.decisions.ranks import compare_with_first
from selective_optim.decisions.table import Group, Row
from selective_optim.fused.guards import same_objects
from selective_optim.step.kernels import AdamKernel, Kernel
from selective_optim.step.parts import fused_choice, wants_fused
from selective_optim.step.setting import PLAIN, Groups

Layout = Sequence[Sequence[Row]]
IDLE = 2  # steps without decay that are none of a schedule
IN_A_ROW = 10  # steps above the first rate
_rate_of = itemgetter("lr")
ABOVE = 1 + 1e-6  # times that; schedules come back to it with an error of rounding
SAMPLE = 512  # weights of a parameter that are looked at for rounding
NOISE = 0.25  # of the rate: the deviation of Adam's update under gradients of noise
UNITS = 6  # in the last place; noise of one hardly ever moves a weight so far
LOSS = "hardly decays"  # what every text says of decay that is rounded away


class Watch:
    """Looks at steps when they are taken, until there is nothing left to tell.

    Args:
        taken_over: Whether to look for decay that a wrapper takes over.
        rounding: Whether to look for decay that half precision rounds away.
    """

    def __init__(self, taken_over: bool = False, rounding: bool = False) -> None:
        self._taken_over, self._rounding, self._idle = taken_over, rounding, 0
        self._found: bool | None = None  # as in `compare`, where that is to be done
        self._layout: Layout = ()
        self._above: list[int] = []  # by group, steps in a row above its limit
        self._rates: list[Any] = []  # at the last step, if none was
        self._limits: list[float] = []

    def compare(self, found: bool) -> None:
        """Compare the next step that moves with other ranks; names may be found."""
        self._found = found

    # Copies count from 0, over their own rows. One rank alone may make copies.
    def __reduce__(self) -> Any:
        return Watch, (self._taken_over, self._rounding)

    def look(self, groups: Groups, layout: Layout, kernel: Any) -> Watch | None:
        """Look at a step, and return what looks at the next one."""
        beginning = self._taken_over or self._rounding or self._found is not None
        if beginning and any(map(_moves, groups)):
            self.begin(groups, layout)
            params = [param for group in groups for param in group["params"]]
            devices = {param.device for param in params if param.dtype in _torch.HALF}
            if self._rounding and not any(map(_torch.is_capturing, devices)):
                self._rounding = False
                decided = [[row.decision for row in rows] for rows in layout]
                if devices and (lost := loss_of(kernel, groups, decided)):
                    warn(lost)
        # Another list, or a longer one, whenever anything moved.
        if layout is not self._layout or len(layout) != len(self._above):
            self._layout, self._above, self._rates = layout, [0] * len(layout), []
            limits = list(map(_limit, layout))
            self._limits = limits if min(limits, default=inf) < inf else []
        if self._limits:
            self._look_at_rates(groups)
        beginning = self._taken_over or self._rounding or self._found is not None
        return self if beginning or self._limits else None

    def begin(self, groups: Groups, layout: Layout) -> bool:
        """Look at a first step that moves; tell whether to look at the next one."""
        if not any(map(_moves, groups)):
            return True
        if self._found is not None:
            found, self._found = self._found, None
            compare_with_first(groups, layout, found)
        self._taken_over = self._taken_over and self._is_idle(groups, layout)
        return self._taken_over

    def _is_idle(self, groups: Groups, layout: Layout) -> bool:
        """Tell whether no group decays, but not yet for long."""
        self._idle += 1
        if not all(is_zero(group["weight_decay"]) for group in groups):
            return False
        departing = [r for rows in layout for r in rows if r.decision.decay != FULL]
        if any(row.decision.decay.fixed for row in departing):
            return False
        policy = next((row.policy for row in departing if row.policy), None)
        if policy is not None and self._idle == IDLE:
            warn_of_decay_taken_over(policy)
        return self._idle < IDLE

    def _look_at_rates(self, groups: Groups) -> None:
        """Tell of the first rate that is above its limit, if not for a moment."""
        rates: list[Any] = list(map(_rate_of, groups))
        if same_objects(rates, self._rates):
            return
        for index, (group, rate, limit) in enumerate(zip(groups, rates, self._limits)):
            if limit == inf:  # nothing there is divided
                continue
            top = group.get("max_lr")
            if isinstance(rate, Tensor):
                rate = rate_now(group) or 0.0
            self._above[index] = self._above[index] + 1 if rate > limit else 0
            if top is not None and is_rate(top) and top > limit:
                rate = top
            elif self._above[index] < IN_A_ROW:
                continue
            rows = self._layout[index]
            if not all(
                is_zero(r.decision.decay.of(group["weight_decay"])) for r in rows
            ):
                self._limits = []  # before: what warns may raise
                where = f"of route {group['route']!r}" if "route" in group else index
                warn_of_high_rate(where, limit, rate)
                return
        # Of tensors others may be written into, and what rises is counted on.
        calm = not any(self._above) and not any(isinstance(r, Tensor) for r in rates)
        self._rates = rates if calm else []


def _moves(group: Group) -> bool:
    """Tell whether a rate is above 0, as one on a device is taken to be."""
    rate = rate_now(group)
    return rate is None or rate > 0


def _limit(rows: Sequence[Row]) -> float:
    """Return the smallest rate that a decay is divided by, and a little more."""
    divided = [row.decision for row in rows if row.decision.decay.needs_lr0]
    return ABOVE * min((each.lr0 for each in divided if each.lr0), default=inf)


def loss_of(
    kernel: Kernel | None, groups: Groups, decided: Iterable[Sequence[Decision]]
) -> str:
    """Name the first parameter of which less than half of the decay will arrive."""
    if not isinstance(kernel, AdamKernel):
        return ""
    for index, (group, decisions) in enumerate(zip(groups, decided)):
        for position, (param, decision) in enumerate(zip(group["params"], decisions)):
            if _loses(kernel, group, param, decision):
                return (
                    f"{decision.label(index, position)} {LOSS}: {param.dtype} "
                    f"rounds more than half of it away at this rate. Keep master "
                    f"weights in float32, or wrap a class with stochastic rounding or "
                    f"Kahan summation, as of torchao or optimi: selective(cls)."
                )
    return ""


def _loses(kernel: Kernel, group: Group, param: Tensor, decision: Decision) -> bool:
    if param.dtype not in _torch.HALF or type(_torch.shard_of(param)) not in PLAIN:
        return False
    decay, lr0 = decision.decay_key
    form, wd = FORMS[decay.form or kernel.default_form(group)], group["weight_decay"]
    if param.is_meta or decay.target or form.applied == "l2":
        return False
    # A warm-up begins low, and ends where a schedule says that it began.
    rate = max(float(group["lr"]), float(group.get("initial_lr", 0.0)))
    if is_zero(decay.of(wd)) or rate <= 0:
        return False
    strength = rate * float(form.strength(decay.of(wd), rate, lr0 or rate))
    fused = wants_fused(kernel, fused_choice(kernel, group), param)
    noise = NOISE * rate if fused and form.applied == "decoupled" else 0.0
    # An odd stride meets every column of a matrix whose rows are a power of 2.
    weights = _torch.shard_of(param.detach()).reshape(-1)
    weights = weights[:: weights.numel() // SAMPLE | 1].abs().cpu()
    due = strength * weights.double()
    moved = _steps_of(weights, due, noise)
    return bool((weights * moved).sum() < (weights * due).sum() / 2)


def _steps_of(weights: Tensor, due: Tensor, noise: float) -> Tensor:
    """Return how far towards 0 decay moves weights in a step, on average."""
    exact, info = weights.double(), torch.finfo(weights.dtype)
    if not noise:
        return exact - (exact - due).to(weights.dtype).double()
    unit = info.eps * exact.clamp(min=info.smallest_normal).log2().floor().exp2()
    edges = (torch.arange(UNITS).unsqueeze(1) + 0.5) * unit
    # Noise exceeds an edge on the side of decay more often than on the other.
    there, back = (torch.special.ndtr((d - edges) / noise) for d in (due, -due))
    # Nothing is rounded away of what is a unit and more.
    return torch.where((noise > unit) | (due > unit), due, unit * (there - back).sum(0))
