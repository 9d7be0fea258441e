"""A step's parts: parameters of one group that decay alike and go to one kernel.

The optimizer's own class steps them as if they were groups split by hand. For SGD, Adam
and AdamW a part is a list of positions; the group that the class sees is a view, made
for one step, so that everything else in it is what the user's group says now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from selective_optim.decay import DecayKey, Decision
from selective_optim.step.setting import Groups


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


def decided_params(
    groups: Groups, decided: Sequence[Sequence[Decision]]
) -> list[DecidedParam]:
    """List every parameter, in order, with what was decided for it."""
    return [
        DecidedParam(param, index, position, decision)
        for index, (group, decisions) in enumerate(zip(groups, decided))
        for position, (param, decision) in enumerate(zip(group["params"], decisions))
    ]


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
