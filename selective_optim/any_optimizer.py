"""The decay report of any optimizer: wrapped, one of several, saved, or measured."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selective_optim._text import held_optimizers, is_optimizer, received, require_decay
from selective_optim.decay import FORMS, Decay, Decision
from selective_optim.decisions.state_dict import RECORD, begin_in
from selective_optim.decisions.watch import LOSS
from selective_optim.parameters import ModelIndex
from selective_optim.policies.decide import NO_POLICY
from selective_optim.report import (
    NOTE,
    DecayReport,
    Row,
    form_of_class,
    judged,
    make_rows,
)

RATE = 1e-2  # of the step that is measured


class Groups(NamedTuple):
    """Groups without an optimizer, and what a state dict says was decided."""

    param_groups: Sequence[Any]
    decided: Sequence[Any] | None = None


def decay_report(
    optimizer: Any,
    model: nn.Module | Sequence[nn.Module] | None = None,
    *,
    measure: bool = False,
) -> DecayReport:
    """Report which parameters decay under any optimizer.

    The reason of a row is the kind of parameter: ``norm``, ``bias``, ``embedding``,
    ``vector`` (fewer than two dimensions) or ``weight``. The last line names what
    looks wrong, and parameters of the model that train but are in no group.

    Args:
        optimizer: An optimizer whose groups have a ``"weight_decay"``: of torch, of
            another library, or of this one, whose policy then gives the reasons. Or a
            list of optimizers, a wrapper that holds one, groups, or a state dict.
        model: The module, or modules, that hold the parameters. Without it, names
            are known only if the optimizer was made of ``named_parameters()``.
        measure: Step copies of the optimizer, with and without the decay, over
            parameters filled with ones, and report the difference. It needs memory
            for float32 copies of all parameters and their states.

    Returns:
        The report, as of ``optimizer.decay_report()``. The groups of a list of
        optimizers are numbered one after another.

    Raises:
        TypeError: ``optimizer`` has no groups.
        ValueError: A group has no ``"weight_decay"``.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        >>> decayed, *exempt = model.parameters()  # is this split right for the model?
        >>> decayed = [decayed, exempt.pop(1)]
        >>> groups = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
        >>> optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
        >>> print(decay_report(optimizer, model))
        group  reason    lr  decay  form         timescale  tensors  elements
            0  weight  0.01    0.1  decoupled  1,000 steps        1         6
            0  norm    0.01    0.1  decoupled  1,000 steps        1         2
            1  bias    0.01      0  exempt                        1         2
            1  norm    0.01      0  exempt                        1         2
        decayed: 2 tensors, 8 elements; exempt: 2 tensors, 4 elements
        looks wrong: 1 norm decays ('1.weight')
    """
    index = ModelIndex(model)
    found = _optimizers_in(optimizer, index)
    alone = len(found) == 1
    rows, told, groups = list[Row](), list[str](), list[Any]()
    for each in found:
        mine = list(each.param_groups)
        require_decay(each, "report")
        decided, form_of = getattr(each, "decided", None), partial(form_of_class, each)
        own = make_rows(mine, decided, form_of, index)
        if hasattr(each, "decay_report"):
            report = each.decay_report()
            own = list(map(_named, report.rows, own))
            # Beside others, what it says of itself alone would be said twice.
            parts = report.remark.partition("\n")[0].split("; ")
            told += [report.remark] if alone else [p for p in parts if LOSS in p]
        own, note = _measured(each, own) if measure else (own, "")
        told.append(note)
        if not (is_optimizer(each) or isinstance(each, Groups)):
            told.append(f"{NOTE}read from the groups of {type(each).__name__} alone")
        route = "" if alone else type(each).__name__
        number = len(groups)
        rows += [
            replace(r, group=number + r.group, route=r.route or route) for r in own
        ]
        groups += mine
    return judged(rows, groups, index, *told)


def _named(row: Row, seen: Row) -> Row:
    if row.reason != NO_POLICY or not seen.name:
        return row
    return replace(row, name=seen.name, role=seen.role, owner=seen.owner)


def _optimizers_in(
    given: Any, index: ModelIndex, above: tuple[Any, ...] = ()
) -> list[Any]:
    if isinstance(given, Mapping):
        given = _saved(given, index) if "param_groups" in given else [*given.values()]
    if isinstance(given, list):
        if all(isinstance(each, Mapping) and "params" in each for each in given):
            return [Groups(given)]
        inside = given
    elif isinstance(given, Groups) or (
        is_optimizer(given) and hasattr(given, "decay_report")
    ):
        return [given]
    else:
        inside = held_optimizers(given)
    # One that is held may hold its wrapper.
    inside = [each for each in inside if all(each is not other for other in above)]
    if inside:
        above = (*above, given)
        return [o for each in inside for o in _optimizers_in(each, index, above)]
    if hasattr(given, "param_groups"):
        return [given]
    raise TypeError(
        f"`optimizer` must have param_groups, and {received(given)} has none. "
        f"Pass the optimizer first, then the model: decay_report(optimizer, model)."
    )


def _saved(state_dict: Mapping[str, Any], index: ModelIndex) -> Groups:
    """Stand in for the optimizer of a state dict, with tensors that have no values."""
    known = {info.telling_name: info.parameter for info in index.everyone()}
    groups, decided = [], []
    records = state_dict.get(RECORD) or repeat(repeat(None))
    for group, record in zip(state_dict["param_groups"], records):
        names = group.get("param_names") or [None] * len(group["params"])
        entries = [state_dict.get("state", {}).get(key, {}) for key in group["params"]]
        params = [known.get(n, _shaped_as(e)) for n, e in zip(names, entries)]
        groups.append({**group, "params": params, "param_names": names})
        decided.append([*map(_recorded, record, names)])
    return Groups(groups, decided)


def _shaped_as(entries: Mapping[str, Any]) -> Tensor:
    shapes = [value.shape for value in entries.values() if isinstance(value, Tensor)]
    shape = max(shapes, key=len, default=(0,))
    return torch.empty(shape, device="meta", requires_grad=True)


def _recorded(entry: Sequence[Any] | None, name: str | None) -> Decision | None:
    if entry is None:
        return None
    begin = begin_in(entry)
    decay = Decay(entry[0], entry[1], begin.get("target"), begin.get("fixed"))
    shape, lr0 = torch.Size((0,)), begin.get("lr0")
    return Decision(decay, "recorded", name, shape, (), lr0=lr0)


def _measured(optimizer: Any, rows: Sequence[Row]) -> tuple[Sequence[Row], str]:
    """Step copies with no, half and the whole decay, and tell what that changes."""
    try:
        steps = [_stepped(optimizer, share) for share in (0.0, 0.5, 1.0)]
    except Exception as error:  # whatever a class raises that is stepped like this
        return rows, f"{NOTE}not measured, {type(error).__name__}: {error}"
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    ends = zip(*steps)
    return [_with_effect(r, decays[r.group], *own) for r, own in zip(rows, ends)], ""


def _stepped(optimizer: Any, share: float) -> Sequence[Tensor]:
    """Step a copy once, over ones and zero gradients, with a share of a decay of 1."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    ones = [nn.Parameter(torch.ones_like(p, dtype=torch.float32)) for p in params]
    memo: dict[int, Any] = {id(p): one for p, one in zip(params, ones)}
    # In the copy, a decay that is fixed has the share, too.
    for known in getattr(optimizer, "decided_params", list)():
        if (decay := known.decision.decay).fixed is not None:
            memo[id(decay)] = replace(decay, fixed=share)
    twin = copy.deepcopy(optimizer, memo)
    if not hasattr(twin, "decay_report"):
        # torch copies what all optimizers have, and nothing that a class adds.
        for name in vars(optimizer).keys() - vars(twin).keys():
            vars(twin)[name] = copy.deepcopy(vars(optimizer)[name], memo)
    twin.state.clear()
    for group in twin.param_groups:
        group.update(lr=RATE, weight_decay=share if group["weight_decay"] else 0.0)
    for param, one in zip(params, ones):
        if param.requires_grad or param.grad is not None:
            one.grad = torch.zeros_like(one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing decays is meant here
        type(twin).step(twin)  # one that was patched is the original's
    return ones


def _with_effect(row: Row, decay: float | Tensor, *steps: Tensor) -> Row:
    # Ones do not decay towards ones, nor towards where they began.
    if row.fate == "frozen" or row.target is not None or not row.numel:
        return row
    none, half, full = (step.detach().reshape(-1)[0].item() for step in steps)
    # Half the decay does not do half as much in L2 of an adaptive class: then the size
    # of the update says nothing about the decay.
    direct = math.isclose(none - full, 2 * (none - half), rel_tol=0.01)
    unit = FORMS[row.form].strength(1.0, RATE, row.lr0) if row.form and row.lr0 else 1.0
    decay = decay if row.fixed is None else row.fixed
    value = float(f"{(none - full) / RATE / unit * float(decay):.4g}")
    return replace(row, applied=none != full, measured=value if direct else None)
