"""A step's parts: parameters of one group that decay alike and go to one kernel.

The optimizer's own class steps them as if they were groups split by hand. For SGD, Adam
and AdamW a part is a list of positions; the group that the class sees is a view, made
for one step, so that everything else in it is what the user's group says now.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import DecayKey, Decision
from selective_optim.step.implementation import fused_choice, joined, takes_fused
from selective_optim.step.kernel import Kernel
from selective_optim.step.setting import Group, Groups, State, States


class DecidedParam(NamedTuple):
    """One parameter with what was decided for it.

    Args:
        param: The parameter.
        group: Index of its group.
        position: Where it stands there.
        decision: How it decays; an ``init`` lies as the parameter does.
    """

    param: Tensor
    group: int
    position: int
    decision: Decision

    @property
    def label(self) -> str:
        """Name it in messages."""
        return self.decision.label(self.group, self.position)


class Key(NamedTuple):
    """What the parameters of a part have in common.

    Args:
        group: Index of their group.
        decay_key: What was decided for them.
        fused: Whether torch's fused kernel steps them right; else they go where the
            flags of their group say.
        sharded: Whether that kernel gets the local shards of ``DTensor``s.
        first: Whether their momentum begins with this step: torch's fused SGD begins
            all buffers of a call or none.
    """

    group: int
    decay_key: DecayKey
    fused: bool = False
    sharded: bool = False
    first: bool = False


@dataclass(eq=False)
class Part:
    """Parameters that the class steps as one group.

    Args:
        key: What they have in common.
        label: Names one of them in messages.
        positions: Their numbers among all parameters of all groups.
        inits: What they decay towards, where that is a tensor for each.
    """

    key: Key
    label: str
    positions: list[int] = field(default_factory=list)
    inits: list[Tensor] = field(default_factory=list)


class Layout(NamedTuple):
    """All parts of a step.

    Args:
        parts: In the order in which their first parameter stands in the groups.
        idle: Positions of parameters that never had a gradient. Their implementation
            is chosen with the first one.
        once: Whether the next step may need other parts: momentum begins in this one,
            or a gradient keeps its parameter from the fused kernel.
    """

    parts: list[Part]
    idle: list[int]
    once: bool


def make_layout(
    kernel: Kernel,
    groups: Groups,
    params: Sequence[DecidedParam],
    states: States,
    stepped: Container[int],
    choosing: bool = True,
) -> Layout:
    """Sort the parameters into parts, and choose the implementation of each.

    Args:
        kernel: Of the optimizer's class.
        groups: Its parameter groups.
        params: All of their parameters, in order.
        states: Its state, by parameter.
        stepped: Ids of the tokens of those that the last layout had a part for. They
            keep one while they have no gradient, so that a gradient that comes and
            goes needs no other layout.
        choosing: Whether to choose fused where that is open; else all of them go
            where the flags of their group say.
    """
    choices = [choosing and fused_choice(kernel, group) for group in groups]
    parts: dict[Key, Part] = {}
    idle: list[int] = []
    once = False
    for number, each in enumerate(params):
        group, choice = groups[each.group], choices[each.group]
        own = {} if choice is False and not group["fused"] else states.get(each.param)
        absent = each.param.grad is None
        begun = kernel.has_state(own, group)
        known = begun and id(_torch.token_of(each.param)) in stepped
        if choice is not False and absent and not known:
            idle.append(number)
            continue
        fused, sharded, misfit = (
            (False, False, False)
            if choice is False
            else _takes_fused(kernel, group, choice, each.param, own or {})
        )
        asked = fused or bool(group["fused"])
        first = asked and not (begun or absent or kernel.counts)
        once |= misfit or first
        key = Key(each.group, each.decision.decay_key, fused, sharded, first)
        part = parts.get(key) or parts.setdefault(key, Part(key, each.label))
        part.positions.append(number)
        if each.decision.init is not None:
            part.inits.append(each.decision.init)
    return Layout(list(parts.values()), idle, once)


def _takes_fused(
    kernel: Kernel, group: Group, choice: bool | None, param: Tensor, own: State
) -> tuple[bool, bool, bool]:
    """Tell whether a parameter is fused, by shards, and misfit by its gradient alone.

    A gradient that is absent now is taken to fit; it is looked at when it comes.
    """
    sharded = type(param) is _torch.dtensor_class()
    fused = takes_fused(kernel, group, choice, param, own, sharded)
    misfit = fused and not (param.grad is None or joined(param, param.grad, sharded))
    fused = fused and not misfit
    return fused, fused and sharded, misfit


def require_dense(
    kernel: Kernel, groups: Groups, params: Sequence[DecidedParam]
) -> None:
    """Check that sparse gradients are those of parameters that step with them.

    Raises:
        RuntimeError: The kernel steps none, or the parameter decays.
    """
    for each in params:
        grad = each.param.grad
        if grad is not None and grad.is_sparse:
            decay = each.decision.decay
            kernel.refuse_sparse(groups[each.group], decay, each.label)
