"""Warnings that need a step: decay that is lost, divided by too small a rate, or other.

The rank that steps first writes down what it decided, in the store of the process
group, and each later one compares: in one call, that waits for nobody.

A weight in half precision moves by whole units in the last place. The fused kernels of
Adam round decay and update together, so that noise of the update carries a decay over
that alone is too small. Elsewhere decay is rounded alone.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from math import inf
from operator import itemgetter
from os.path import commonprefix
from typing import Any
from zlib import compress, decompress

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._text import warn
from selective_optim.decay import FORMS, FULL, Decision, is_zero, none_decays
from selective_optim.decisions.table import Row
from selective_optim.fused.guards import params_of, same_objects
from selective_optim.step.kernels import AdamKernel, Kernel
from selective_optim.step.parts import fused_choice, wants_fused
from selective_optim.step.setting import PLAIN, Groups, is_moving, is_rate, rate_now

Layout = Sequence[Sequence[Row]]
IDLE = 2  # steps without decay that are none of a schedule
IN_A_ROW = 10  # steps above the first rate
_rate_of = itemgetter("lr")
ABOVE = 1 + 1e-6  # times that; schedules come back to it with an error of rounding
SAMPLE = 512  # weights of a parameter that are looked at for rounding
NOISE = 0.25  # of the rate: the deviation of Adam's update under gradients of noise
UNITS = 6  # in the last place; noise of one hardly ever moves a weight so far
LOSS = "hardly decays"  # what every text says of decay that is rounded away
# What stands around a model, up to a module that is one of several, as a stage is.
AROUND = re.compile(r"(?:[^.\d][^.]*\.)*?(?=[^.]+\.\d+\.|[^.]*$)|")


class Watch:
    """Looks at steps when they are taken, until there is nothing left to tell."""

    _idle = 0
    # Unless `None`, ranks are compared at the next step; whether names were searched.
    found: bool | None = None
    _layout: Layout = ()
    _above: list[int]  # by group, steps in a row above its limit
    _rates: list[Any]  # at the last step, if none was
    _limits: list[float]

    def __init__(self, taken_over: bool = False, rounding: bool = False) -> None:
        # Whether to look for decay that a wrapper takes over, or rounding takes away.
        self._taken_over, self._rounding = taken_over, rounding

    # Copies count from 0, over their own rows. One rank alone may make copies.
    def __reduce__(self) -> Any:
        return Watch, (self._taken_over, self._rounding)

    @property
    def _beginning(self) -> bool:
        return self._taken_over or self._rounding or self.found is not None

    def look(self, groups: Groups, layout: Layout, kernel: Any) -> Watch | None:
        """Look at a step, and return what looks at the next one."""
        beginning = self.begin(groups, layout, kernel)
        # Another list, or a longer one, whenever anything moved.
        if layout is not self._layout or len(layout) != len(self._above):
            limits = list(map(_limit, layout))
            self._limits = limits if min(limits, default=inf) < inf else []
            self._layout, self._above, self._rates = layout, [0] * len(layout), []
        if self._limits:
            self._look_at_rates(groups)
        return self if beginning or self._limits else None

    def begin(self, groups: Groups, layout: Layout, kernel: Any = None) -> bool:
        """Look at a first step that moves; tell whether to look at the next one."""
        if self._beginning and any(map(is_moving, groups)):
            if self.found is not None:
                found, self.found = self.found, None
                _compare_with_first(groups, layout, found)
            self._taken_over = self._taken_over and self._is_idle(groups, layout)
            self._look_at_rounding(groups, layout, kernel)
        return self._beginning

    def _look_at_rounding(self, groups: Groups, layout: Layout, kernel: Any) -> None:
        devices = {p.device for p in params_of(groups) if p.dtype in _torch.HALF}
        if self._rounding and not any(map(_torch.is_capturing, devices)):
            self._rounding = False
            decided = [[row.decision for row in rows] for rows in layout]
            if devices and (lost := loss_of(kernel, groups, decided)):
                warn(lost)

    def _is_idle(self, groups: Groups, layout: Layout) -> bool:
        """Tell whether no group decays, but not yet for long."""
        self._idle += 1
        if not none_decays(groups):
            return False
        departing = [r for rows in layout for r in rows if r.decision.decay != FULL]
        if any(row.decision.decay.fixed for row in departing):
            return False
        policy = next((row.policy for row in departing if row.policy), None)
        if policy is not None and self._idle == IDLE:
            warn(
                f"`weight_decay` is 0 in every group since the first step, and was "
                f"more when the optimizer was made, so no group decays and `wd_policy` "
                f"{policy!r} has no effect. A wrapper that applies decay itself wants "
                f"groups that are split by hand: torch's class over selective_optim."
                f"param_groups(model, {policy!r}, weight_decay=...). A schedule that "
                f"begins at 0 may ignore this."
            )
        return self._idle < IDLE

    def _look_at_rates(self, groups: Groups) -> None:
        """Tell of the first rate that is above its limit, if not for a moment."""
        rates: list[Any] = list(map(_rate_of, groups))
        if same_objects(rates, self._rates):
            return
        for index, (group, rate, limit) in enumerate(zip(groups, rates, self._limits)):
            if limit == inf:  # nothing there is divided; a class may have no rate
                continue
            if isinstance(rate, Tensor):
                rate = rate_now(group) or 0.0
            self._above[index] = self._above[index] + 1 if rate > limit else 0
            top: Any = group.get("max_lr")
            if is_rate(top) and top > limit:
                rate = top
            elif self._above[index] < IN_A_ROW:
                continue
            wd, rows = group["weight_decay"], self._layout[index]
            if any(not is_zero(row.decision.decay.of(wd)) for row in rows):
                self._limits = []  # before: what warns may raise
                where = f"of route {group['route']!r}" if "route" in group else index
                warn(
                    f"decay in group {where} is divided by {limit:g}, the rate that it "
                    f"began with, and its rate rises to {rate:g}: it decays more than "
                    f"`weight_decay` says. Give it the rate that is meant: "
                    f"dict(params=..., initial_lr={rate:g})."
                )
                return
        # Of tensors others may be written into, and what rises is counted on.
        calm = not any(self._above) and not any(isinstance(r, Tensor) for r in rates)
        self._rates = rates if calm else []


def _limit(rows: Sequence[Row]) -> float:
    """Return the smallest rate that a decay is divided by, and a little more."""
    decisions = [row.decision for row in rows if row.decision.decay.needs_lr0]
    return ABOVE * min((d.lr0 for d in decisions if d.lr0), default=inf)


def _compare_with_first(groups: Groups, layout: Layout, found: bool) -> None:
    """Warn if another rank decided otherwise for the same parameters.

    Names or places, and shapes, are the key: stages of a pipeline share neither. So is
    how many optimizers of these this rank has stepped, as a sweep makes several. What
    stands before all names of living modules is left out: one rank may have a wrapper.
    """
    store = _torch.store_of_ranks()
    if store is None:
        return
    described = sorted(_described(groups, layout))
    if not described:
        return
    labels, shapes, decays = zip(*described)
    names = [label.strip("'") for label in labels]
    # What all parameters of one module share is the name of that, and not around it.
    owners = {name.rpartition(".")[0] for name in names}
    shared = commonprefix(names) if found and len(owners) > 1 else ""  # noqa: RUF071
    prefix = AROUND.findall(shared)[0]
    inside = (name.removeprefix(prefix) for name in names)
    text = "\n".join(map(" ".join, zip(inside, shapes)))
    key = f"selective_optim/{sha256(text.encode()).hexdigest()}"
    rank = torch.distributed.get_rank()
    try:
        key = f"{key}/{store.add(f'{key}/of rank {rank}', 1)}"
        # Decisions repeat from layer to layer: of 200,000 parameters this is a few kB.
        encoded = b64encode(compress("\n".join(decays).encode()))
        first = store.compare_set(key, "", encoded.decode())
    except RuntimeError:  # nobody serves it any longer
        return
    if first in (b"", encoded):  # empty: a store that keeps nothing, as of a fake group
        return
    firsts = decompress(b64decode(first)).decode().split("\n")
    others = [i for i, decay in enumerate(decays) if decay != firsts[i]]
    if others:
        i, same = others[0], "model=model and the same" if found else "the same"
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        warn(
            f"rank {rank} decided otherwise than the rank that stepped first: "
            f"{labels[i]} is {decays[i]} here and {firsts[i]} there{more}. Pass "
            f"{same} `wd_policy` and routes on every rank, as texts or mappings from "
            f"names. Ranks that train apart on purpose may ignore this."
        )


def _described(groups: Groups, layout: Layout) -> Iterator[tuple[str, str, str]]:
    """Name each parameter, its shape, how it decays and which route steps it."""
    policies = {id(row.policy) for rows in layout for row in rows}
    for index, (group, rows) in enumerate(zip(groups, layout)):
        route = f" on route {group['route']!r}" if "route" in group else ""
        for place, (param, row) in enumerate(zip(group["params"], rows)):
            decision, needs = row.decision, row.policy.needs if row.policy else ()
            ruled = len(policies) == 1 and "anything" not in needs
            # In places of shards or master copies each rank may have another tensor.
            if decision.telling_name is None and not ruled:
                continue
            # A piece of what is flattened has another shape on every rank.
            shape = "" if _torch.is_flattened(param) else str(tuple(decision.shape))
            yield decision.label(index, place), shape, f"{decision.decay!r}{route}"


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


def _loses(
    kernel: Kernel, group: dict[str, Any], param: Tensor, decision: Decision
) -> bool:
    if param.dtype not in _torch.HALF or type(_torch.shard_of(param)) not in PLAIN:
        return False
    decay, lr0, _ = decision.decay_key
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
    down, up = (torch.special.ndtr((d - edges) / noise) for d in (due, -due))
    # Nothing is rounded away of what is a unit and more.
    return torch.where((noise > unit) | (due > unit), due, unit * (down - up).sum(0))
