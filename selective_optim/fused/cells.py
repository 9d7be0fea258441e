"""Which parameters of the fused parts may share a kernel call, and their first state.

A cell holds parameters of one part on one device, of one dtype. What their group's
hyperparameters are does not matter here, so cells outlive a changing learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import DecayKey
from selective_optim.fused.counters import Counters
from selective_optim.step.kernel import Kernel
from selective_optim.step.parts import DecidedParam, Part
from selective_optim.step.setting import Groups, States

# torch's fused kernels on the CPU open a parallel region for every tensor, however
# small (grain size 0 in aten/src/ATen/native/cpu/Fused*Kernel.cpp, 2.7 to 2.15). A
# tensor of this many elements or fewer takes one thread less time than two: on two
# cores AdamW and SGD met at 4,096. With more threads a region costs more, and saves
# at most twice as much, so that the cut does not fall. Where other processes hold the
# cores, every region waits for a thread that is not scheduled.
ONE_THREAD = 4096


class CellKey(NamedTuple):
    """What the parameters of a cell have in common; see also ``parts.Key``."""

    group: int
    decay_key: DecayKey
    single_thread: bool
    sharded: bool
    device: torch.device
    dtype: torch.dtype


class Cell(NamedTuple):
    """Parameters that always go through a kernel together.

    Args:
        key: What they have in common.
        label: Names one of them in messages.
        positions: Their numbers among all parameters of all groups.
        inits: What they decay towards, where that is a tensor for each.
    """

    key: CellKey
    label: str
    positions: list[int]
    inits: list[Tensor]


def make_cells(parts: Sequence[Part], params: Sequence[DecidedParam]) -> list[Cell]:
    """Cut the fused parts into cells: plain ones first, then those of ``DTensor``s.

    Among both, cells that take all threads come first.
    """
    cells: dict[CellKey, Cell] = {}
    for part in parts:
        group, decay_key, _, sharded, _ = part.key
        for place, number in enumerate(part.positions):
            param = params[number].param
            size = _torch.shard_of(param).numel() if param.is_cpu else ONE_THREAD + 1
            small = size <= ONE_THREAD
            key = CellKey(group, decay_key, small, sharded, param.device, param.dtype)
            cell = cells.get(key)
            if cell is None:
                cell = cells[key] = Cell(key, part.label, [], [])
            cell.positions.append(number)
            if part.inits:
                cell.inits.append(part.inits[place])
    return sorted(cells.values(), key=lambda c: (c.key.sharded, c.key.single_thread))


def begin_state(
    kernel: Kernel,
    groups: Groups,
    parts: Sequence[Part],
    params: Sequence[DecidedParam],
    states: States,
    counters: Counters,
) -> None:
    """Make the state of fused parameters that have none, as torch makes it.

    Counters may share one tensor per device.
    """
    mine = {number for part in parts for number in part.positions}
    new: dict[int, DecidedParam] = {}
    for number in sorted(mine):
        each = params[number]
        if not kernel.has_state(states.get(each.param) or {}, groups[each.group]):
            new.setdefault(id(_torch.token_of(each.param)), each)
    shared: dict[torch.device, Iterator[Tensor]] = {}
    devices = [each.param.device for each in new.values()]
    for device in dict.fromkeys(devices) if counters.joining else ():
        # Room for those that train and have no gradient yet, as an unused head: another
        # block would be another call.
        later = sum(
            p.param.device == device and p.param.requires_grad and p.param.grad is None
            for p in params
        )
        shared[device] = iter(counters.reserve(device, devices.count(device), later))
    for each in new.values():
        step = next(shared[each.param.device]) if shared else None
        kernel.begin(states[each.param], each.param, groups[each.group], step)
