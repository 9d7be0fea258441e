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
from selective_optim.decay import Terms
from selective_optim.step.counters import Counters
from selective_optim.step.kernel import (
    PLAIN,
    Group,
    Groups,
    Kernel,
    State,
    States,
)

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
        terms: How it decays.
        label: Names it in messages.
        init: What it decays towards, if that is a tensor; lies as the parameter does.
    """

    param: Tensor
    group: int
    terms: Terms
    label: str
    init: Tensor | None = None


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


def is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor fills its memory without gaps or overlap."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of one shape walk their memory in the same order."""
    if a.stride() == b.stride():
        return True
    pairs = zip(a.stride(), b.stride(), a.shape, strict=True)
    return a.numel() == 0 or all(x == y for x, y, size in pairs if size > 1)


def _beside(param: Tensor, other: Tensor) -> bool:
    """Tell whether a tensor walks memory as the parameter does, on its device."""
    return (
        type(other) in PLAIN
        and other.device == param.device
        and other.layout == torch.strided
        and other.shape == param.shape
        and same_layout(param, other)
        and not other.is_neg()
    )


def fusable(kernel: Kernel, param: Tensor, moments: Sequence[Tensor]) -> bool:
    """Tell whether torch's fused kernel steps these tensors right.

    It walks memory from the first element on: on the CPU a view with gaps would be
    written into its neighbors and a transposed moment misread (torch 2.7 to 2.15,
    measured).
    """
    return (
        type(param) in PLAIN
        and param.layout == torch.strided
        and param.dtype in _torch.FUSED_DTYPES
        and param.device.type in _torch.FUSED_DEVICES
        and is_dense(param)
        and not param.is_neg()
        and all(
            _beside(param, moment) and kernel.takes_beside(param, moment)
            for moment in moments
        )
    )


def joins(param: Tensor, grad: Tensor) -> bool:
    """Tell whether a gradient can go beside its parameter into the fused kernel."""
    return _beside(param, grad) and grad.dtype == param.dtype


def counts_beside(param: Tensor, step: object) -> bool:
    """Tell whether a fused kernel can read a step counter."""
    return (
        isinstance(step, Tensor)
        and step.dtype == torch.float32
        and step.device == param.device
        and step.numel() == 1
    )


def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the local shards of ``DTensor``s, or ``None`` if they are placed apart."""
    first = tensors[0]
    if any(type(tensor) is not type(first) for tensor in tensors):
        return None
    where = _torch.placement(_torch.spec_of(first))
    if any(_torch.placement(_torch.spec_of(tensor)) != where for tensor in tensors):
        return None
    if any(placement.is_partial() for placement in where[1]):
        return None
    return [_torch.local_tensor(tensor) for tensor in tensors]


def free_choice(group: Group) -> bool:
    """Tell whether the user left the implementation open."""
    return group["fused"] is None and group["foreach"] is None


def fused_choice(kernel: Kernel, group: Group) -> bool | None:
    """Tell whether a group goes to the fused kernel; ``None`` where that is open.

    Asked once per group: it looks at every hyperparameter.
    """
    if group["differentiable"]:
        return False
    if group["fused"]:
        return True
    return None if free_choice(group) and kernel.takes_numbers(group) else False


def wants_fused(kernel: Kernel, choice: bool | None, param: Tensor) -> bool:
    """Tell whether a parameter goes to the fused kernel if its tensors allow it.

    Where nothing was chosen, fused is taken where it is right: it is exact to
    hand-split torch with ``fused=True``, and the fastest on every device measured.
    """
    return kernel.trusted(param) if choice is None else choice


def key_of(
    kernel: Kernel, group: Group, choice: bool | None, member: Member, own: State
) -> Key:
    """Choose the way of one parameter: the key of its cell.

    A gradient that is absent now is taken to fit; it is looked at when it comes.
    """
    param = member.param
    grad = param.grad
    begun = kernel.has_state(own, group)
    tensors = [param]
    if own:
        found = [own.get(entry) for entry in kernel.entries(group)]
        tensors += [entry for entry in found if entry is not None]
    sharded = type(param) is _torch.dtensor_class()
    local = local_tensors(tensors) if sharded else tensors
    fused = (
        local is not None
        and wants_fused(kernel, choice, param)
        and fusable(kernel, local[0], local[1:])
        and ("step" not in own or counts_beside(local[0], own["step"]))
    )
    alone = fused and param.is_cpu and (local or tensors)[0].numel() <= ALONE
    odd = fused and grad is not None and not _joins(param, grad, sharded)
    layout = param.layout if grad is None else grad.layout
    first = not begun and not kernel.counts
    return Key(
        group=member.group,
        terms=member.terms,
        alone=alone and not odd,
        fused=fused and not odd,
        sharded=fused and not odd and sharded,
        # Fused buffers that are not dampened begin like any other step.
        first=first
        and bool(group["dampening"] if fused and not odd else group["fused"]),
        odd=odd and layout == torch.strided,
        layout=layout,
        device=param.device,
        dtype=param.dtype,
    )


def _joins(param: Tensor, grad: Tensor, sharded: bool) -> bool:
    if not sharded:
        return joins(param, grad)
    pair = local_tensors([param, grad])
    return pair is not None and joins(*pair)


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
            token = _torch.token_of(param)
            if not begun or stepping.get(id(token)) is not token:
                continue
        key = key_of(kernel, group, choices[member.group], member, own)
        if not begun and not kernel.counts and times[id(_torch.token_of(param))] > 1:
            # Listed twice, its momentum begins twice in torch, which is left to torch.
            key = key._replace(fused=False, sharded=False, odd=True)
        if group["fused"] and not key.fused:
            _torch.require_fused_support(param)
        cell = cells.get(key) or cells.setdefault(key, Cell(key, member.label))
        cell.positions.append(position)
        if member.init is not None:
            cell.inits.append(member.init)
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
        later = sum(
            m.param.device == device and m.param.requires_grad and m.param.grad is None
            for m in members
        )
        steps[device] = iter(counters.reserve(device, fused.count(device), later))
    for member, goes_fused in new:
        param, group = member.param, groups[member.group]
        step = next(steps[param.device]) if goes_fused and joined else None
        kernel.begin(states[param], param, group, goes_fused, step)
