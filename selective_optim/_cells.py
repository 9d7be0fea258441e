"""Which tensors may share a kernel call, and by which path each can go.

A cell holds the parameters of one group that were decided alike and live alike.
What the group's hyperparameters are does not matter here, so cells outlive a
changing learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._kernels import Group, Kernel, Lists, State
from selective_optim._rules import Form

PLAIN = (Tensor, torch.nn.Parameter)


class Member(NamedTuple):
    """One parameter with what was decided for it; ``label`` is for messages."""

    param: Tensor
    group: int
    multiplier: float
    form: Form | None
    label: str


class Key(NamedTuple):
    """What the parameters of a cell have in common.

    ``fused`` and ``sharded`` name the path: torch's fused kernel on the tensors or
    on the local shards of ``DTensor``s, else torch's functional. ``first`` marks
    parameters that have no moments yet, ``odd`` those that only the gradient they
    have now keeps from the fused path.
    """

    group: int
    multiplier: float
    form: Form | None
    fused: bool
    sharded: bool
    first: bool
    odd: bool
    layout: torch.layout
    device: torch.device
    dtype: torch.dtype


@dataclass(eq=False)
class Cell:
    """Parameters that always go through a kernel together, and their state.

    ``params`` and ``states`` are the user's; ``local``, ``moments`` and ``steps`` are
    what the kernel gets; ``slots`` number the parameters among all of their device;
    ``label`` names one of them for messages.
    """

    key: Key
    label: str
    params: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    local: list[Tensor] = field(default_factory=list)
    moments: Lists = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    def add(
        self, param: Tensor, state: State, slot: int, tensors: list[Tensor]
    ) -> None:
        """Take in a parameter with the tensors that :func:`path_of` found."""
        self.params.append(param)
        self.states.append(state)
        self.slots.append(slot)
        local, *moments = tensors
        self.local.append(local)
        self.moments = self.moments or [[] for _ in moments]
        for entry, moment in zip(self.moments, moments, strict=True):
            entry.append(moment)


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


def fits(param: Tensor, other: Tensor) -> bool:
    """Tell whether a tensor can go beside a parameter into a fused kernel."""
    return (
        type(other) in PLAIN
        and other.dtype == param.dtype
        and other.device == param.device
        and other.layout == torch.strided
        and other.shape == param.shape
        and same_layout(param, other)
    )


def _fusable(param: Tensor, others: Sequence[Tensor]) -> bool:
    """Tell whether torch's fused kernels step these tensors right.

    They walk memory from the first element on: on the CPU a view with gaps would
    be written into its neighbors and a transposed gradient misread (torch 2.7 to
    2.15, measured).
    """
    return (
        type(param) in PLAIN
        and param.layout == torch.strided
        and param.dtype in _torch.FUSED_DTYPES
        and param.device.type in _torch.FUSED_DEVICES
        and is_dense(param)
        and all(fits(param, other) for other in others)
    )


def fused_still(key: Key, param: Tensor, *others: Tensor) -> bool:
    """Tell whether a parameter planned for the fused path can still go there."""
    alike = param.dtype == key.dtype and param.device == key.device
    return alike and _fusable(param, others)


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


def path_of(
    kernel: Kernel, group: Group, member: Member, grad: Tensor | None, state: State
) -> tuple[Key, list[Tensor]]:
    """Choose the way of one parameter: its cell's key and the tensors it brings.

    The tensors are the parameter and its moments: local shards on the sharded path,
    else the tensors themselves. A gradient that is absent now is taken to fit; it
    is looked at when it comes.
    """
    param = member.param
    entries = [state.get(entry) for entry in kernel.entries(group)]
    own = [param, *(entry for entry in entries if entry is not None)]
    fused, sharded, local = _fused_path(kernel, group, own)
    odd = fused and grad is not None and not _joins(own[0], grad, local[0])
    fused = fused and not odd
    layout = param.layout if grad is None else grad.layout
    key = Key(
        *(member.group, member.multiplier, member.form),
        *(fused, fused and sharded, len(own) - 1 < len(entries)),
        odd and layout == torch.strided,
        *(layout, param.device, param.dtype),
    )
    return key, local if fused else own


def _fused_path(
    kernel: Kernel, group: Group, own: list[Tensor]
) -> tuple[bool, bool, list[Tensor]]:
    """Tell whether a parameter can be fused, whether sharded, and as what tensors."""
    sharded = type(own[0]) is _torch.dtensor_class()
    local = local_tensors(own) if sharded else own
    wanted = group["fused"] or (free_choice(group) and kernel.trusted(own[0]))
    fused = bool(wanted and local and _fusable(local[0], local[1:]))
    return fused, sharded, local or own


def _joins(param: Tensor, grad: Tensor, local: Tensor) -> bool:
    """Tell whether a gradient can go beside the parameter into the fused kernel."""
    if local is param:
        return fits(param, grad)
    pair = local_tensors([param, grad])
    return pair is not None and fits(*pair)
