"""Which tensors may share a kernel call, and by which path each can go.

A cell holds the parameters of one group that were decided alike and live alike.
What the group's hyperparameters are does not matter here, so cells outlive a
changing learning rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import Decision, Terms
from selective_optim.step.counters import Counters
from selective_optim.step.fused import (
    fused_choice,
    goes_fused,
    joined,
    local_tensors,
)
from selective_optim.step.kernel import Kernel
from selective_optim.step.setting import Group, Groups, State, States

# torch's fused kernels on the CPU open a parallel region for every tensor, however
# small (grain size 0 in aten/src/ATen/native/cpu/Fused*Kernel.cpp, 2.7 to 2.15). A
# tensor of this many elements or fewer takes one thread less time than two: on two
# cores AdamW and SGD met at 4,096. With more threads a region costs more, and saves
# at most twice as much, so that the cut does not fall. Where other processes hold the
# cores, every region waits for a thread that is not scheduled.
ALONE = 4096


class Member(NamedTuple):
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
    """What the parameters of a cell have in common.

    ``alone`` says that one thread is enough, see ``ALONE``. ``fused`` and ``sharded``
    name the path: torch's fused kernel on the tensors or on the local shards of
    ``DTensor``s, else torch's functional. ``first`` marks
    parameters whose momentum begins with this step, in a way of its own; ``odd``
    those that only the gradient they have now keeps from the fused path.
    """

    group: int
    terms: Terms
    alone: bool
    fused: bool
    sharded: bool
    first: bool
    odd: bool
    layout: torch.layout
    device: torch.device
    dtype: torch.dtype


@dataclass(eq=False)
class Cell:
    """Parameters that always go through a kernel together.

    ``positions`` number them among all parameters of all groups; ``label`` names one
    of them for messages; ``inits`` are what they decay towards, where that is a tensor.
    """

    key: Key
    label: str
    positions: list[int] = field(default_factory=list)
    inits: list[Tensor] = field(default_factory=list)


def require_dense(kernel: Kernel, groups: Groups, members: Sequence[Member]) -> None:
    """Check that sparse gradients are those of parameters that step with them.

    Raises:
        RuntimeError: The kernel steps none, or the parameter decays.
    """
    for member in members:
        grad = member.param.grad
        if grad is not None and grad.is_sparse:
            decay = member.decision.decay
            kernel.refuse_sparse(groups[member.group], decay, member.label)


def key_of(
    kernel: Kernel,
    group: Group,
    choice: bool | None,
    member: Member,
    own: State,
    begun: bool,
) -> Key:
    """Choose the way of one parameter: the key of its cell.

    A gradient that is absent now is taken to fit; it is looked at when it comes.

    Args:
        kernel: Of the optimizer's class.
        group: The parameter's group.
        choice: Of that group, see ``fused_choice``.
        member: The parameter.
        own: Its state.
        begun: Whether that has begun.
    """
    param = member.param
    grad = param.grad
    tensors = [param]
    if own:
        found = [own.get(entry) for entry in kernel.entries(group)]
        tensors += [entry for entry in found if entry is not None]
    sharded = type(param) is _torch.dtensor_class()
    local = local_tensors(tensors) if sharded else tensors
    fused = goes_fused(kernel, choice, param, local, own)
    # The state fits and the gradient does not: torch's functional takes it this once.
    odd = fused and grad is not None and not joined(param, grad, sharded)
    fused = fused and not odd
    layout = param.layout if grad is None else grad.layout
    first = not begun and not kernel.counts
    return Key(
        group=member.group,
        terms=member.decision.terms,
        alone=fused and param.is_cpu and (local or tensors)[0].numel() <= ALONE,
        fused=fused,
        sharded=fused and sharded,
        # Fused buffers that are not dampened begin like any other step.
        first=first and bool(group["dampening"] if fused else group["fused"]),
        odd=odd and layout == torch.strided,
        layout=layout,
        device=param.device,
        dtype=param.dtype,
    )


def make_cells(
    kernel: Kernel,
    groups: Groups,
    members: Sequence[Member],
    states: States,
    counters: Counters,
    stepping: Mapping[int, object],
) -> list[Cell]:
    """Sort the parameters that step, and begin the state of those that never did.

    A parameter that stepped under the last plan stays while it has no gradient, so
    that gradients which come and go need no other plan.

    Returns:
        Cells in the order plain fused, sharded fused, functional; in the fused ones
        those that take all threads first.
    """
    choices = [fused_choice(kernel, group) for group in groups]
    cells: dict[Key, Cell] = {}
    new: dict[int, tuple[Member, bool]] = {}
    times = Counter(id(_torch.token_of(member.param)) for member in members)
    for position, member in enumerate(members):
        param, group = member.param, groups[member.group]
        own = states.get(param) or {}
        begun = kernel.has_state(own, group)
        if param.grad is None:
            # By token and not by id, which another tensor may have by now.
            token = _torch.token_of(param)
            if not begun or stepping.get(id(token)) is not token:
                continue
        key = key_of(kernel, group, choices[member.group], member, own, begun)
        if not begun and not kernel.counts and times[id(_torch.token_of(param))] > 1:
            # Listed twice, its momentum begins twice in torch, which is left to torch.
            key = key._replace(fused=False, sharded=False, odd=True)
        if group["fused"] and not key.fused:
            _torch.require_fused_support(param)
        cell = cells.get(key) or cells.setdefault(key, Cell(key, member.label))
        cell.positions.append(position)
        if member.decision.init is not None:
            cell.inits.append(member.decision.init)
        if not begun:
            new.setdefault(id(_torch.token_of(param)), (member, key.fused))
    _begin(kernel, groups, members, [*new.values()], states, counters)
    return sorted(
        cells.values(),
        key=lambda cell: (not cell.key.fused, cell.key.sharded, cell.key.alone),
    )


def _begin(
    kernel: Kernel,
    groups: Groups,
    members: Sequence[Member],
    new: Sequence[tuple[Member, bool]],
    states: States,
    counters: Counters,
) -> None:
    """Make state; counters of fused parameters may share one tensor per device."""
    joined = kernel.counts and counters.joining
    fused = [member.param.device for member, fused in new if fused]
    steps: dict[torch.device, Iterator[Tensor]] = {}
    for device in dict.fromkeys(fused) if joined else ():
        # Room for those that train and have no gradient yet, as an unused head: another
        # block would be another call.
        later = sum(
            m.param.device == device and m.param.requires_grad and m.param.grad is None
            for m in members
        )
        steps[device] = iter(counters.reserve(device, fused.count(device), later))
    for member, fused_way in new:
        param, group = member.param, groups[member.group]
        step = next(steps[param.device]) if fused_way and joined else None
        kernel.begin(states[param], param, group, fused_way, step)
