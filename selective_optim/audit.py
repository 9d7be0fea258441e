"""What decays: in a model under a policy, and under any optimizer.

An optimizer may be wrapped, one of several, or saved, and its decay may be measured.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selective_optim._text import (
    aligned,
    held_optimizers,
    is_optimizer,
    received,
    require_decay,
    shape_text,
)
from selective_optim.decay import FORMS, Decay, Decision
from selective_optim.decisions.state_dict import RECORD, begin_in
from selective_optim.decisions.watch import LOSS
from selective_optim.parameters import ModelIndex
from selective_optim.policies.decide import NO_POLICY
from selective_optim.policies.differences import decide_alone, diff
from selective_optim.policies.named import as_policy
from selective_optim.policies.recipes import marked
from selective_optim.policies.recognition import kind_of
from selective_optim.report import (
    COLORS,
    NOTE,
    DecayReport,
    Row,
    form_of_class,
    grouped,
    make_rows,
    plain,
    report_on,
)

HEADINGS = {
    "norm": "looks wrong: norms that decay",
    "bias": "looks wrong: biases that decay",
    "vector": "looks wrong: tensors of fewer than two dimensions that decay",
    "marked": "looks wrong: decay, and the model's author marked them as exempt",
    "tied": "looks wrong: tied parameters with two verdicts",
    "other": "worth a look: decay, and are neither weights of layers, norms nor biases",
}
ROW_KEYS = ("name", "shape", "numel", "requires_grad", "form", "target")
# What the weights of a layer are called: weight, in_proj_weight, gate_up_proj.
WEIGHT_LEAF = re.compile(r"weight|kernel|proj")
SHOWN = 10  # lines of each heading that print; all of them are in `findings`
RATE = 1e-2  # of the step that is measured


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong under a policy.

    Args:
        kind: ``"norm"``, ``"bias"``, ``"vector"``, ``"marked"`` or ``"tied"``; of a
            hint ``"other"``.
        name: Canonical name of the parameter.
        shape: Its shape.
        reason: The reason of the policy; for ``"tied"``, at each place.
    """

    kind: str
    name: str | None
    shape: torch.Size
    reason: str


def model_report(
    model: nn.Module, wd_policy: object = "no_bias_norm", weight_decay: float = 1.0
) -> DecayReport:
    """Report what a policy decays in a model, without an optimizer.

    Args:
        model: Module to report on, on any device, ``meta`` included.
        wd_policy: As for the optimizers.
        weight_decay: Decay that multipliers multiply.

    Returns:
        The report. Its rates are NaN. The form is ``None`` if the policy states none.

    Raises:
        ValueError: The policy is not known, or a glob matches nothing.

    Example:
        >>> print(model_report(nn.Linear(3, 2), "no_bias"))
        group  reason           decay  form     tensors  elements
            0  decays in full       1  default        1         6
            0  exclude is_bias      0  exempt         1         2
        decayed: 1 tensor, 6 elements; exempt: 1 tensor, 2 elements
    """
    infos, decisions = decide_alone(model, wd_policy)
    params = [info.parameter for info in infos]
    groups = [{"params": params, "weight_decay": weight_decay}]
    rows = make_rows(groups, [decisions], lambda group: None, ModelIndex(model))
    return DecayReport(tuple(rows))  # an audit lists what looks wrong


def find_mistakes(
    model: nn.Module, wd_policy: object = "no_bias_norm"
) -> list[Finding]:
    """List parameters whose decay looks wrong.

    It lists norms, biases and vectors that decay towards 0, and parameters that decay
    although the model's author marked them (``policies.marked``). It also lists tied
    parameters for which the policy decides differently at different places. Frozen
    parameters are left out. Arguments and errors are those of ``audit``.
    """
    return [each for each in _findings(model, wd_policy) if each.kind != "other"]


def find_hints(model: nn.Module, wd_policy: object = "no_bias_norm") -> list[Finding]:
    """List decayed parameters that are no weights of layers: tokens, scales, gates.

    Few of them are mistakes, but recipes differ on them. Parameters that
    ``find_mistakes`` lists are left out. Arguments and errors are those of ``audit``.
    """
    return [each for each in _findings(model, wd_policy) if each.kind == "other"]


def _findings(model: nn.Module, wd_policy: object) -> Iterator[Finding]:
    policy = as_policy(wd_policy).bind([model])
    author = marked().bind([model])
    for info, decision in zip(*decide_alone(model, wd_policy), strict=True):
        if not info.parameter.requires_grad:
            continue
        reasons, kind, mark = dict[str, str](), kind_of(info), author.decide(info)
        if decays := decision.decay.multiplier != 0:
            # Decay towards another value than 0 is intended.
            if kind in HEADINGS and decision.decay.target is None:
                reasons[kind] = decision.reason
            elif not mark.decay.multiplier:
                reasons["marked"] = mark.reason
        # Each place by itself: asked as one parameter, all would answer alike.
        places = [replace(p, names=(p.name or "",), elsewhere=()) for p in info.places]
        answers = [policy.decide(place) for place in places]
        if len({answer.decay for answer in answers}) > 1:
            pairs = zip(places, answers)
            parts = [f"{p.name}: {a.decay.multiplier:g} ({a.reason})" for p, a in pairs]
            reasons["tied"] = "; ".join(parts)
        if decays and not reasons:
            # A shape such as 1 x 64 x 1 x 1, which scales channels, is a vector's.
            vector = sum(size > 1 for size in info.parameter.shape) < 2
            if vector or not WEIGHT_LEAF.search(info.leaf or ""):
                reasons["other"] = decision.reason
        for kind, reason in reasons.items():
            yield Finding(kind, info.telling_name, info.parameter.shape, reason)


@dataclass(frozen=True)
class Audit:
    """A report, the disagreements with another policy, and what looks wrong.

    Args:
        model: Class name of the model.
        policy: The policy, as it was given.
        report: Decay of every parameter, per unit of ``weight_decay``.
        findings: Parameters whose decay looks wrong.
        against: The other policy, as it was given; ``None`` if there is none.
        difference: Parameters on which the two disagree, as of ``policies.diff``.
        hints: Decayed parameters that are no weights of layers.
    """

    model: str
    policy: str
    report: DecayReport
    findings: tuple[Finding, ...]
    against: str | None = None
    difference: Any = None
    hints: tuple[Finding, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether nothing looks wrong, and the other policy decides the same."""
        return not self.findings and not self.difference

    def __str__(self) -> str:
        title = f"{self.policy} on {self.model}, per unit of weight_decay"
        parts = [f"{title}\n{self.report}"]
        if self.against is not None:
            parts.append(f"against {self.against}\n{self.difference}")
        if not self.findings:
            parts.append("looks wrong: nothing")
        by_kind = grouped([*self.findings, *self.hints], lambda each: each.kind)
        for kind, heading in HEADINGS.items():
            if findings := by_kind.get(kind):
                parts.append(f"{heading}, {len(findings):,}\n{_listed(findings)}")
        return "\n\n".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers, ready for JSON."""
        report = self.report.as_dict()
        rows = [
            {key: row[key] for key in (*ROW_KEYS, "fixed", "reason")}
            | {"multiplier": row["weight_decay"] if row["fixed"] is None else 1.0}
            for row in report["rows"]
        ]
        return {
            **{key: getattr(self, key) for key in ("model", "policy", "against")},
            "rows": rows,
            **{fate: report[fate] for fate in COLORS},
            "disagreements": plain(getattr(self.difference, "rows", ())),
            "findings": plain(self.findings),
            "hints": plain(self.hints),
        }


def _listed(findings: Sequence[Finding]) -> str:
    table = [(str(f.name), shape_text(f.shape), f.reason) for f in findings[:SHOWN]]
    more = [f"and {len(findings) - SHOWN:,} more"] if len(findings) > SHOWN else []
    return "\n".join(f"  {line}" for line in [*aligned(table), *more])


def audit(
    model: nn.Module, wd_policy: object = "no_bias_norm", against: object = None
) -> Audit:
    """Report what a policy decays, what looks wrong, and how another one differs.

    Args:
        model: Module to audit, on any device, ``meta`` included.
        wd_policy: As for the optimizers.
        against: Another policy to compare with, or ``None``.

    Raises:
        ValueError: A policy is not known, or a glob matches nothing.
    """
    policy, other = (p if isinstance(p, str) else repr(p) for p in (wd_policy, against))
    findings = list(_findings(model, wd_policy))
    return Audit(
        model=type(model).__name__,
        policy=policy,
        report=model_report(model, wd_policy),
        findings=tuple(each for each in findings if each.kind != "other"),
        against=None if against is None else other,
        difference=None if against is None else diff(model, wd_policy, against),
        hints=tuple(each for each in findings if each.kind == "other"),
    )


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
    optimizers = _optimizers_in(optimizer, index)
    single = len(optimizers) == 1
    rows, remarks, groups = list[Row](), list[str](), list[Any]()
    for item in optimizers:
        item_groups = list(item.param_groups)
        require_decay(item, "report")
        decided, form_of = getattr(item, "decided", None), partial(form_of_class, item)
        item_rows = make_rows(item_groups, decided, form_of, index)
        if hasattr(item, "decay_report"):
            report = item.decay_report()
            item_rows = list(map(_named, report.rows, item_rows))
            # Beside others, what it says of itself alone would be said twice.
            clauses = report.remark.partition("\n")[0].split("; ")
            remarks += [report.remark] if single else [c for c in clauses if LOSS in c]
        if measure:
            item_rows, note = _measured(item, item_rows)
            remarks.append(note)
        if not (is_optimizer(item) or isinstance(item, Groups)):
            remarks.append(f"{NOTE}read from the groups of {type(item).__name__} alone")
        route = "" if single else type(item).__name__
        for row in item_rows:
            number = len(groups) + row.group
            rows.append(replace(row, group=number, route=row.route or route))
        groups += item_groups
    return report_on(rows, groups, index, *remarks)


def _named(row: Row, same: Row) -> Row:
    if row.reason != NO_POLICY or not same.name:
        return row
    return replace(row, name=same.name, role=same.role, owner=same.owner)


def _optimizers_in(
    item: Any, index: ModelIndex, wrappers: tuple[Any, ...] = ()
) -> list[Any]:
    if isinstance(item, Mapping):
        item = _saved(item, index) if "param_groups" in item else [*item.values()]
    listed = isinstance(item, list)
    if listed and all(isinstance(g, Mapping) and "params" in g for g in item):
        item = Groups(item)
    ours = is_optimizer(item) and hasattr(item, "decay_report")
    if ours or isinstance(item, Groups):
        return [item]
    held = item if listed else held_optimizers(item)
    # One that is held may hold its wrapper.
    if held := [o for o in held if all(o is not wrapper for wrapper in wrappers)]:
        wrappers = (*wrappers, item)
        return [o for inner in held for o in _optimizers_in(inner, index, wrappers)]
    if hasattr(item, "param_groups"):
        return [item]
    raise TypeError(
        f"`optimizer` must have param_groups, and {received(item)} has none. "
        f"Pass the optimizer first, then the model: decay_report(optimizer, model)."
    )


def _saved(state_dict: Mapping[str, Any], index: ModelIndex) -> Groups:
    """Stand in for the optimizer of a state dict, with tensors that have no values."""
    by_name = {info.telling_name: info.parameter for info in index.everyone()}
    groups, decided = [], []
    records = state_dict.get(RECORD) or repeat(repeat(None))
    for group, record in zip(state_dict["param_groups"], records):
        names = group.get("param_names") or [None] * len(group["params"])
        entries = [state_dict.get("state", {}).get(key, {}) for key in group["params"]]
        params = [by_name.get(n, _shaped_as(e)) for n, e in zip(names, entries)]
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
    return Decision(decay, "recorded", name, torch.Size((0,)), (), lr0=begin.get("lr0"))


def _measured(optimizer: Any, rows: list[Row]) -> tuple[list[Row], str]:
    try:
        steps = [_stepped(optimizer, share) for share in (0.0, 0.5, 1.0)]
    except Exception as error:  # whatever a class raises that is stepped like this
        return rows, f"{NOTE}not measured, {type(error).__name__}: {error}"
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    pairs = zip(rows, zip(*steps))
    return [_with_effect(r, decays[r.group], *after) for r, after in pairs], ""


def _stepped(optimizer: Any, share: float) -> Sequence[Tensor]:
    """Step a copy once, over ones and zero gradients, with a share of a decay of 1."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    ones = [nn.Parameter(torch.ones_like(p, dtype=torch.float32)) for p in params]
    memo: dict[int, Any] = {id(p): filled for p, filled in zip(params, ones)}
    # In the copy, a decay that is fixed has the share, too.
    for decided in getattr(optimizer, "decided_params", list)():
        if (decay := decided.decision.decay).fixed is not None:
            memo[id(decay)] = replace(decay, fixed=share)
    twin = copy.deepcopy(optimizer, memo)
    if not hasattr(twin, "decay_report"):
        # torch copies what all optimizers have, and nothing that a class adds.
        for name in vars(optimizer).keys() - vars(twin).keys():
            vars(twin)[name] = copy.deepcopy(vars(optimizer)[name], memo)
    twin.state.clear()
    for group in twin.param_groups:
        group.update(lr=RATE, weight_decay=share if group["weight_decay"] else 0.0)
    for param, filled in zip(params, ones):
        if param.requires_grad or param.grad is not None:
            filled.grad = torch.zeros_like(filled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing decays is meant here
        type(twin).step(twin)  # one that was patched is the original's
    return ones


def _with_effect(row: Row, decay: float | Tensor, *steps: Tensor) -> Row:
    # Ones do not decay towards ones, nor towards where they began.
    if row.fate == "frozen" or row.target is not None or not row.numel:
        return row
    none, half, full = (step.detach().reshape(-1)[0].item() for step in steps)
    # In L2 of an adaptive class half the decay is not half the effect: no measure then.
    direct = math.isclose(none - full, 2 * (none - half), rel_tol=0.01)
    form = FORMS[row.form or "l2"]
    unit = float(form.strength(1.0, RATE, row.lr0 or RATE))
    decay = decay if row.fixed is None else row.fixed
    value = float(f"{(none - full) / RATE / unit * float(decay):.4g}")
    return replace(row, applied=none != full, measured=value if direct else None)
