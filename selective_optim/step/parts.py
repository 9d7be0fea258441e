"""Parts of SGD, Adam and AdamW: parameters of a group that decay alike, by one kernel.

A part is a list of positions; the group that the class sees is a view, made for one
step of what the user's group says now. Other classes have ``lasting_parts``.

A parameter without a gradient is not moved, decayed or counted. Where fused may be
chosen, it has no part before its first gradient (``Layout.idle``). Else it keeps its
part: the class (``param.grad is None``), the plan (``Bucket.present``) and passes
(``View.present``) leave it out of the step. So it is with ``lasting_parts``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import DecayKey, Decision
from selective_optim.step.setting import PLAIN, Group, Groups, State, States, picker

Kernel = Any  # of ``step.kernels``, which reads hyperparameters and state
_traits = attrgetter("device", "shape", "layout")
_meta_like = partial(torch.empty_like, device="meta")
_place, _kind = attrgetter("dtype", "device"), attrgetter("dtype", "device", "shape")

# torch's fused kernels on the CPU open a parallel region for every tensor, however
# small (grain size 0 in aten/src/ATen/native/cpu/Fused*Kernel.cpp, 2.7 to 2.15). A
# tensor of this many elements or fewer takes one thread less time than two: on two
# cores AdamW and SGD met at 4,096. With more threads a region costs more, and saves
# at most twice as much, so that the cut does not fall. Where other processes hold the
# cores, every region waits for a thread that is not scheduled.
ONE_THREAD = 4096


class DecidedParam(NamedTuple):
    """One parameter with what was decided for it."""

    param: Tensor
    group: int  # index of its group
    position: int  # where it stands there
    decision: Decision  # its ``init`` lies as the parameter does

    @property
    def label(self) -> str:
        return self.decision.label(self.group, self.position)


class Key(NamedTuple):
    """What the parameters of a part have in common."""

    decay_key: DecayKey
    group: int  # index of their group
    fused: bool = False  # torch's fused kernel steps them; else as their group's flags
    sharded: bool = False  # that kernel gets the local shards of DTensors
    # Momentum begins in this step: torch's fused SGD begins that of all or none.
    first: bool = False
    # What tensors of one kernel call have in common, for those that are planned.
    single_thread: bool = False
    device: Any = None
    dtype: Any = None

    @property
    def planned(self) -> bool:
        """Whether a plan steps them, and not the class."""
        return self.device is not None


@dataclass(eq=False)
class Part:
    """Parameters that the class steps as one group."""

    key: Key
    label: str  # names one of them in messages
    positions: list[int] = field(default_factory=list)  # among all of all groups
    inits: list[Tensor] = field(default_factory=list)  # targets, if a tensor for each
    view: Any = None  # of ``class_step``, while the group's numbers stay as they are

    @cached_property
    def pick_params(self) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        return picker(self.positions)


class Layout(NamedTuple):
    """All parts of a step, in the order of their first parameters."""

    parts: list[Part]
    # Positions of those that never had a gradient. The first one decides where they go.
    idle: list[int]
    # Whether the next step may need other parts: momentum begins in this one, or a
    # gradient keeps its parameter from the fused kernel.
    once: bool


def free_choice(group: Group) -> bool:
    """Tell whether the user left the implementation open."""
    return group.get("fused") is None and group.get("foreach") is None


def fused_choice(kernel: Kernel, group: Group) -> bool | None:
    """Tell whether a group is fused; ``None`` where each parameter is asked."""
    if group.get("differentiable"):
        return False
    if group["fused"]:
        return True
    # It looks at every hyperparameter: once per group.
    return None if free_choice(group) and kernel.takes_numbers(group) else False


def wants_fused(kernel: Kernel, choice: bool | None, param: Tensor) -> bool:
    """Tell whether a parameter goes to the fused kernel if its tensors allow it."""
    # It is exact to hand-split torch with `fused=True`, and the fastest on every
    # device measured: where nothing was chosen, it is taken where it is right.
    return kernel.trusted(param) if choice is None else choice


def _beside(param: Tensor, other: Tensor) -> bool:
    """Tell whether a tensor walks memory as the parameter does, on its device."""
    if type(other) not in PLAIN or _traits(other) != _traits(param) or other.is_neg():
        return False
    if param.stride() == other.stride() or param.numel() == 0:
        return True
    strides = zip(param.stride(), other.stride(), param.shape, strict=True)
    return all(a == b for a, b, size in strides if size > 1)


def fusable(kernel: Kernel, param: Tensor, moments: Sequence[Tensor]) -> bool:
    """Tell whether torch's fused kernel steps these tensors right."""
    # It walks memory from the first element on: on the CPU a view with gaps would be
    # written into its neighbors, a transposed moment misread (torch 2.7 to 2.15).
    return (
        type(param) in PLAIN
        and param.layout == torch.strided
        and param.dtype in _torch.FUSED_DTYPES
        and param.device.type in _torch.FUSED_DEVICES
        # `empty_like` keeps the strides of a tensor without gaps or overlap alone.
        and (param.is_contiguous() or _meta_like(param).stride() == param.stride())
        and not param.is_neg()
        and all(
            _beside(param, moment) and kernel.takes_beside(param, moment)
            for moment in moments
        )
    )


def joins(param: Tensor, grad: Tensor) -> bool:
    """Tell whether a gradient can go beside its parameter into the fused kernel."""
    return grad.dtype == param.dtype and _beside(param, grad)


def counts_beside(param: Tensor, step: object) -> bool:
    """Tell whether a fused kernel can read a step counter."""
    return (
        isinstance(step, Tensor)
        and step.dtype == torch.float32
        and step.device == param.device
        and step.numel() == 1
    )


def _shards(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the local shards of ``DTensor``s, or ``None`` if they are placed apart."""
    if len(set(map(type, tensors))) > 1:
        return None
    where, *others = map(_torch.placement, tensors)
    partial_sums = any(placement.is_partial() for placement in where[1])
    if partial_sums or any(other != where for other in others):
        return None
    return _torch.local_tensors(tensors)


def make_layout(
    kernel: Kernel,
    groups: Groups,
    params: Sequence[DecidedParam],
    states: States,
    with_part: Container[int],
    may_choose: bool = True,
    planned: bool = False,
) -> Layout:
    """Sort all parameters into parts, and choose the implementation of each."""
    choices = [may_choose and fused_choice(kernel, group) for group in groups]
    all_fused = _all_fused(kernel, groups, set(choices), params, states)
    parts: dict[Key, Part] = {}
    quick_parts: dict[object, Part] = {}  # by what is quicker to compare than keys
    idle, once = list[int](), False
    for number, each in enumerate(params):
        param, group, choice = each.param, groups[each.group], choices[each.group]
        state = states.get(param) or {}
        absent = not all_fused and param.grad is None
        has_state = (all_fused and kernel.counts) or kernel.has_state(state, group)
        # One whose gradient comes and goes keeps its part, and the layout stays.
        keeps_part = absent and has_state and id(_torch.token_of(param)) in with_part
        if choice is not False and absent and not keeps_part:
            idle.append(number)
            continue
        fused, sharded, misfit = all_fused, False, False
        if not all_fused:
            fused, sharded, misfit = _takes_fused(kernel, group, choice, each, state)
        begins = not (has_state or absent or kernel.counts)
        first = begins and bool(fused or group["fused"])
        once |= misfit or first
        call = _kernel_call_key(param) if planned and fused and not first else ()
        decay, *_, lr0, init = each.decision
        common = (each.group, fused, sharded, first, *call)
        quick_key = id(decay), lr0, init is None, common
        part = quick_parts.get(quick_key)
        if part is None:
            key = Key(each.decision.decay_key, *common)
            part = parts.setdefault(key, Part(key, each.label))
            quick_parts[quick_key] = part
        part.positions.append(number)
        if init is not None:
            part.inits.append(init)
    return Layout(list(parts.values()), idle, once)


def _kernel_call_key(param: Tensor) -> tuple[bool, torch.device, torch.dtype]:
    small = param.is_cpu and _torch.shard_of(param).numel() <= ONE_THREAD
    return small, param.device, param.dtype


def _all_fused(
    kernel: Kernel,
    groups: Groups,
    choices: Collection[bool | None],
    decided: Sequence[DecidedParam],
    states: States,
) -> bool:
    """Tell in C, in a fifth of the time, if all are fused; ``False`` says nothing."""
    params = [each.param for each in decided]
    owns = [states.get(param) or {} for param in params]
    entries = set(map(kernel.entries, groups)) if any(owns) else {()}
    if False in choices or len(entries) != 1 or not _torch.CAN_PLAN:
        return False
    try:
        columns: list[Any] = [[own[e] for own in owns] for e in entries.pop()]
        steps = [own["step"] for own in owns if "step" in own]
        few_steps = dict(zip(map(_kind, steps), steps)).values()
        plain = {*PLAIN}.issuperset(map(type, params))
        plain &= all(map(Tensor.is_contiguous, params))
    except (KeyError, AttributeError, RuntimeError):
        return False
    one_of_each = dict(zip(map(_place, params), params)).values()
    if not (
        plain
        and not any(map(Tensor.is_neg, params))
        and all(fusable(kernel, param, ()) for param in one_of_each)
        and all(wants_fused(kernel, c, p) for c in choices for p in one_of_each)
        and all(counts_beside(p, step) for step in few_steps for p in one_of_each)
    ):
        return False
    # Of the type that gradients and moments have.
    proof = _torch.tensor_proof([param.detach() for param in params])
    return all(proof(*column) for column in (*columns, [p.grad for p in params]))


def _takes_fused(
    kernel: Kernel, group: Group, choice: bool | None, each: DecidedParam, own: State
) -> tuple[bool, bool, bool]:
    """Tell whether a parameter is fused, by shards, and misfit for its gradient."""
    param = each.param
    if param.grad is not None and param.grad.is_sparse:
        kernel.refuse_sparse(group, each.decision.decay, each.label)
    if not wants_fused(kernel, choice, param):
        return False, False, False
    sharded = type(param) is _torch.dtensor_class()
    found = [own.get(entry) for entry in kernel.entries(group)] if own else []
    tensors = [param, *(entry for entry in found if entry is not None)]
    local = _shards(tensors) if sharded else tensors
    fused = (
        local is not None
        and fusable(kernel, local[0], local[1:])
        and ("step" not in own or counts_beside(local[0], own["step"]))
    )
    if not fused or param.grad is None:  # which is looked at when it comes
        return fused, fused and sharded, False
    pair = _shards([param, param.grad]) if sharded else [param, param.grad]
    fits = pair is not None and joins(*pair)
    return fits, fits and sharded, not fits
