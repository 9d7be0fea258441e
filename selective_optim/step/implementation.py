"""The choice of fused, and the parts that it makes of the groups.

Where the user left the implementation open, fused is taken where it is right. What
its tensors do not allow goes where the flags of its group say.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence
from itertools import product, starmap
from operator import attrgetter, eq
from typing import Any

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.step.kernel import Kernel
from selective_optim.step.parts import DecidedParam, Key, Layout, Part
from selective_optim.step.setting import PLAIN, Group, Groups, State, States

_traits = attrgetter("device", "shape")
_kind = attrgetter("dtype", "device", "layout", "shape")


def free_choice(group: Group) -> bool:
    """Tell whether the user left the implementation open."""
    return group.get("fused") is None and group.get("foreach") is None


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


def _beside(param: Tensor, other: Tensor) -> bool:
    """Tell whether a tensor walks memory as the parameter does, on its device."""
    plain = type(other) in PLAIN and _traits(other) == _traits(param)
    if not plain or other.layout != torch.strided or other.is_neg():
        return False
    strides = zip(param.stride(), other.stride(), param.shape, strict=True)
    return param.numel() == 0 or all(a == b for a, b, size in strides if size > 1)


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


def one_of_each(columns: Sequence[Sequence[Any]]) -> list[Tensor] | None:
    """Return a tensor of each dtype and device if columns are alike, row by row.

    ``None`` says nothing: one is absent, or no plain contiguous tensor, or unlike those
    beside it. This looks in C, in a third of the time of one look after another.
    """
    if not all({*PLAIN}.issuperset(map(type, column)) for column in columns):
        return None
    try:
        kinds = list(map(_kind, columns[0]))
        alike = all(
            all(map(eq, map(_kind, column), kinds))
            and all(map(Tensor.is_contiguous, column))
            and not any(map(Tensor.is_neg, column))
            for column in columns
        )
    except RuntimeError:  # of a sparse tensor
        return None
    found = dict(zip(kinds, columns[0])).items()
    return [*{kind[:2]: each for kind, each in found}.values()] if alike else None


def _all_plain(
    kernel: Kernel,
    entries: Collection[tuple[str, ...]],
    choices: Collection[bool | None],
    params: Sequence[Tensor],
    owns: Sequence[State],
) -> bool:
    """Tell whether at one look all parameters are fused; ``False`` says nothing."""
    if False in choices or len(entries) != 1:
        return False
    names = next(iter(entries)) if any(owns) else ()
    try:
        moments = [[own[name] for own in owns] for name in names]
        steps = [own["step"] for own in owns if "step" in own]
        few_steps = dict(zip(map(_kind, steps), steps)).values()
    except (KeyError, AttributeError):
        return False
    found = one_of_each([params, [param.grad for param in params], *moments])
    return found is not None and all(
        [
            *starmap(counts_beside, product(found, few_steps)),
            *(fusable(kernel, param, ()) for param in found),
            *(wants_fused(kernel, each, p) for each in choices for p in found),
        ]
    )


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
    where = _torch.placement(first)
    if any(_torch.placement(tensor) != where for tensor in tensors):
        return None
    if any(placement.is_partial() for placement in where[1]):
        return None
    return [_torch.local_tensor(tensor) for tensor in tensors]


def joined(param: Tensor, grad: Tensor, sharded: bool) -> bool:
    """Tell whether a gradient goes there beside its parameter, by shards if sharded."""
    if not sharded:
        return joins(param, grad)
    pair = local_tensors([param, grad])
    return pair is not None and joins(*pair)


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
    tensors, entries = [each.param for each in params], set(map(kernel.entries, groups))
    owns = [states.get(param) or {} for param in tensors]
    plain = _all_plain(kernel, entries, set(choices), tensors, owns)
    parts: dict[Key, Part] = {}
    known_parts: dict[object, Part] = {}  # by what is quicker to compare than keys
    idle, once = list[int](), False
    for number, each in enumerate(params):
        param, group, choice = each.param, groups[each.group], choices[each.group]
        own = owns[number] if choice is not False or group["fused"] else {}
        # Plain ones have a gradient, and counters begin as well in later steps.
        begun = (plain and kernel.counts) or kernel.has_state(own, group)
        absent = not plain and param.grad is None
        known = absent and begun and id(_torch.token_of(param)) in stepped
        if choice is not False and absent and not known:
            idle.append(number)
            continue
        fused, sharded, misfit = plain, False, False
        if not plain:
            _require_dense(kernel, group, each)
            fused, sharded, misfit = _takes_fused(kernel, group, choice, param, own)
        first = not (begun or absent or kernel.counts) and bool(fused or group["fused"])
        once |= misfit or first
        decay, *_, lr0, init = each.decision
        own_key = each.group, id(decay), lr0, init is None, fused, sharded, first
        part = known_parts.get(own_key)
        if part is None:
            key = Key(each.group, each.decision.decay_key, fused, sharded, first)
            part = parts.setdefault(key, Part(key, each.label))
            known_parts[own_key] = part
        part.positions.append(number)
        if init is not None:
            part.inits.append(init)
    return Layout(list(parts.values()), idle, once)


def _takes_fused(
    kernel: Kernel, group: Group, choice: bool | None, param: Tensor, own: State
) -> tuple[bool, bool, bool]:
    """Tell whether a parameter is fused, by shards, and misfit by its gradient alone.

    It is where torch's fused kernel is to step it, and steps it, or its shard, right.
    A gradient that is absent now is taken to fit; it is looked at when it comes.
    """
    if not wants_fused(kernel, choice, param):
        return False, False, False
    sharded = type(param) is _torch.dtensor_class()
    found = [own.get(entry) for entry in kernel.entries(group)] if own else []
    tensors = [param, *(entry for entry in found if entry is not None)]
    local = local_tensors(tensors) if sharded else tensors
    fused = (
        local is not None
        and fusable(kernel, local[0], local[1:])
        and ("step" not in own or counts_beside(local[0], own["step"]))
    )
    misfit = fused and not (param.grad is None or joined(param, param.grad, sharded))
    fused = fused and not misfit
    return fused, fused and sharded, misfit


def _require_dense(kernel: Kernel, group: Group, each: DecidedParam) -> None:
    """Check that a sparse gradient is that of a parameter that steps with it.

    Raises:
        RuntimeError: The kernel steps none, or the parameter decays.
    """
    if each.param.grad is not None and each.param.grad.is_sparse:
        kernel.refuse_sparse(group, each.decision.decay, each.label)
