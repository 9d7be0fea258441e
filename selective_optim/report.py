"""The decay report: what will decay, how much and why, before training starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import import_module
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from selective_optim import _torch
from selective_optim._arguments import require_decay
from selective_optim._text import aligned, received
from selective_optim.decay import FORMS, FULL, Decision, Form, Target, target_text
from selective_optim.parameters import (
    ModelIndex,
    ParameterInfo,
    owner_kinds,
    shape_now,
    wanted,
)
from selective_optim.policies.selectors import kind_of

NUMBERS = ("group", "lr", "decay", "timescale", "tensors", "elements")
MANY_GROUPS = 8  # more are summed up together: a group per layer would fill pages
FEW_RUNS = 3  # group numbers are spelled out up to so many ranges
MANY_BARS = 16  # the rest of the kinds is one bar
COLORS = {"decayed": "C0", "exempt": "C1", "frozen": "0.8"}


@dataclass(frozen=True)
class Row:
    """What happens to one parameter.

    Args:
        group: Index of its parameter group.
        name: Canonical name, or ``None`` where no name is known. What a
            parametrization made several of, as weight norm its gain and direction,
            bear their own names: ``"0.parametrizations.weight.original0"``.
        shape: Original shape.
        numel: Number of elements.
        lr: Learning rate of the group now; NaN where there is no optimizer.
        weight_decay: Effective decay, ``group["weight_decay"] * multiplier``, of a
            frozen parameter what it would be.
        form: ``"l2"``, ``"decoupled"`` or another of ``policies.form``; ``None``
            where the optimizer will decide, or does not say.
        reason: The selector that decided; for an optimizer without a policy, what
            the parameter is.
        requires_grad: Whether it trains; a frozen parameter does not decay.
        owner: Class name of the module that holds it; empty where none is known.
        target: What it decays towards: a number, or ``"init"``; ``None`` is 0.
        lr0: The rate that its training began with, where its form needs that.
    """

    group: int
    name: str | None
    shape: torch.Size
    numel: int
    lr: float
    weight_decay: float
    form: Form | None
    reason: str
    requires_grad: bool = True
    owner: str = ""
    target: Target | None = None
    lr0: float | None = None

    @property
    def fate(self) -> str:
        """What becomes of the parameter: ``decayed``, ``exempt`` or ``frozen``."""
        if not self.requires_grad:
            return "frozen"
        return "decayed" if self.weight_decay else "exempt"

    @property
    def effect(self) -> str:
        """In which form it decays, and towards what unless 0; or that it does not."""
        if self.fate != "decayed":
            return self.fate
        form = self.form or "default"
        return f"{form} towards {target_text(self.target)}" if self.target else form

    @property
    def timescale(self) -> float | None:
        """Steps in which decoupled decay alone shrinks to 1/e: ``1 / (lr * wd)``."""
        form = FORMS[self.form or "l2"]
        # Not `lr <= 0`: without an optimizer the rate is NaN.
        if self.fate != "decayed" or form.applied != "decoupled" or not self.lr > 0:
            return None
        lr0 = self.lr if self.lr0 is None else self.lr0
        return float(1 / (self.lr * form.strength(self.weight_decay, self.lr, lr0)))

    @property
    def kind(self) -> str:
        """What it is, as ``Linear.weight``; the reason where that is not known."""
        leaf = self.name.rpartition(".")[2] if self.name else ""
        return f"{self.owner}.{leaf}" if self.owner and leaf else self.reason


@dataclass(frozen=True)
class DecayReport:
    """One record per parameter in ``rows``; prints as a table by group and reason.

    The rate is that of the group now. The timescale, ``1 / (lr * decay)``, is the
    number of steps over which decoupled decay forgets: after it 37 % of a weight
    are left that no gradient renews. Frozen parameters are counted apart.

    Args:
        rows: The records.
        remark: What looks wrong, in one line; printed at the end.

    Example:
        >>> from selective_optim import AdamW
        >>> model = torch.nn.Linear(3, 2)
        >>> print(AdamW(model, weight_decay=0.1, wd_policy="no_bias").decay_report())
        group  reason              lr  decay  form          timescale  tensors  elements
            0  no match         0.001    0.1  decoupled  10,000 steps        1         6
            0  exclude is_bias  0.001      0  exempt                         1         2
        decayed: 1 tensor, 6 elements; exempt: 1 tensor, 2 elements
    """

    rows: tuple[Row, ...]
    remark: str = ""

    def table(self) -> list[tuple[str, ...]]:
        """Sum the rows up by group, reason, decay and form, in the order of the groups.

        The first line are the headers. Beyond eight groups, those that share reason
        and form are one line, with the range of their rates and decays. Columns in
        which nothing is known are left out.
        """
        # Layerwise groups differ in rate alone, and would fill a page.
        many = len({row.group for row in self.rows}) > MANY_GROUPS
        sums: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            group = () if many else (row.group, row.weight_decay)
            sums.setdefault((row.reason, row.effect, *group), []).append(row)
        lines = [_line(rows) for rows in sums.values()]
        known = [key for key in _line(self.rows) if any(line[key] for line in lines)]
        return [tuple(known), *(tuple(line[key] for key in known) for line in lines)]

    def summary(self) -> str:
        """Say in one line how much decays."""
        parts = {fate: [r for r in self.rows if r.fate == fate] for fate in COLORS}
        told = [f"{fate}: {_amount(parts[fate])}" for fate in ("decayed", "exempt")]
        if parts["frozen"]:
            told.append(f"frozen: {_amount(parts['frozen'])}")
        return "; ".join(told)

    def __str__(self) -> str:
        table = self.table() if self.rows else []
        right = [i for i, key in enumerate(table[0]) if key in NUMBERS] if table else []
        lines = aligned(table, right) if table else []
        return "\n".join(filter(None, [*lines, self.summary(), self.remark]))

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        headers, *lines = self.table() if self.rows else [()]
        head = _html_row("th", headers, headers)
        body = "\n".join(_html_row("td", headers, line) for line in lines)
        told = "; ".join(filter(None, [self.summary(), self.remark]))
        parts = f"<thead>\n{head}\n</thead>\n<tbody>\n{body}\n</tbody>"
        return f"<table>\n<caption>{escape(told)}</caption>\n{parts}\n</table>"

    def plot(self, ax: Any = None) -> Any:
        """Draw the share of each kind of parameter that decays, counts beside it.

        A kind is the class of the module that holds the parameter and the name there,
        as ``Linear.weight``; where no module is known, the reason.

        Args:
            ax: Axes of matplotlib to draw into; ``None`` makes a figure.

        Returns:
            The axes.

        Raises:
            ImportError: ``ax`` is ``None`` and matplotlib is missing.
        """
        kinds = _by_kind(self.rows)
        ax = _new_axes(len(kinds)) if ax is None else ax
        left = [0.0] * len(kinds)
        for fate in dict.fromkeys(row.fate for row in _in_order(self.rows)):
            shares = [_share(rows, fate) for rows in kinds.values()]
            color = COLORS[fate]
            ax.barh(range(len(kinds)), shares, 0.7, left, color=color, label=fate)
            left = [a + b for a, b in zip(left, shares)]
        for place, rows in enumerate(kinds.values()):
            ax.text(102, place, _amount(rows), va="center", fontsize="small")
        ax.set_yticks(range(len(kinds)), list(kinds))
        ax.invert_yaxis()
        ax.set_xlim(0, 100)
        ax.set_xlabel("share of the elements of a kind (%)")
        ax.set_title(self.summary().replace("; ", "\n"), loc="left", fontsize="medium")
        ax.spines[["top", "right"]].set_visible(False)
        anchor = {"loc": "upper left", "bbox_to_anchor": (0, -0.5 / (len(kinds) + 1))}
        ax.legend(**anchor, borderaxespad=2, ncols=3, frameon=False)
        return ax


def _in_order(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: list(COLORS).index(row.fate))


def _by_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Collect rows by kind, the largest first, and the smallest under one name."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    ordered = sorted(kinds.items(), key=lambda item: -sum(r.numel for r in item[1]))
    if len(ordered) <= MANY_BARS:
        return dict(ordered)
    rest = [row for _, own in ordered[MANY_BARS - 1 :] for row in own]
    count = len(ordered) - MANY_BARS + 1
    return {**dict(ordered[: MANY_BARS - 1]), f"{count} other kinds": rest}


def _share(rows: Sequence[Row], fate: str) -> float:
    total = sum(row.numel for row in rows)
    return 100 * sum(r.numel for r in rows if r.fate == fate) / total if total else 0.0


def amount(count: int, noun: str, plural: str | None = None) -> str:
    """Count a noun: ``1 tensor``, ``1,000 tensors``."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def _amount(rows: Sequence[Row]) -> str:
    elements = sum(row.numel for row in rows)
    return f"{amount(len(rows), 'tensor')}, {amount(elements, 'element')}"


def _line(rows: Sequence[Row]) -> dict[str, str]:
    frozen = rows[0].effect == "frozen"
    return {
        "group": _runs(sorted({row.group for row in rows})),
        "reason": rows[0].reason,
        "lr": _span([row.lr for row in rows if not math.isnan(row.lr)]),
        "decay": "-" if frozen else _span([row.weight_decay for row in rows]),
        "form": rows[0].effect,
        "timescale": _steps([row.timescale for row in rows]),
        "tensors": f"{len(rows):,}",
        "elements": f"{sum(row.numel for row in rows):,}",
    }


def _runs(groups: Sequence[int]) -> str:
    """Write ``[0, 1, 2, 5]`` as ``0-2, 5``, and more ranges as ``4 groups``."""
    runs = [
        [group for _, group in run]
        for _, run in groupby(enumerate(groups), lambda pair: pair[1] - pair[0])
    ]
    if len(runs) > FEW_RUNS:
        return f"{len(groups)} groups"
    return ", ".join(f"{r[0]}-{r[-1]}" if r[1:] else f"{r[0]}" for r in runs)


def _span(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low} to {high}"


def _steps(timescales: Sequence[float | None]) -> str:
    known = [value for value in timescales if value is not None]
    if not known:
        return ""
    low, high = f"{min(known):,.0f}", f"{max(known):,.0f}"
    return f"{low} steps" if low == high else f"{low} to {high} steps"


def _html_row(tag: str, headers: Sequence[str], cells: Sequence[str]) -> str:
    sides = ("right" if key in NUMBERS else "left" for key in headers)
    styled = (
        f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>'
        for side, cell in zip(sides, cells)
    )
    return f"<tr>{''.join(styled)}</tr>"


def _new_axes(bars: int) -> Any:
    try:
        pyplot = import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError(
            "`plot` draws with matplotlib, which is not installed. "
            "Type pip install matplotlib, or pass axes of your own as ax."
        ) from error
    _, ax = pyplot.subplots(figsize=(8, 1.8 + 0.35 * bars), layout="constrained")
    return ax


def _number(value: float | Tensor) -> float:
    # Waits for the device, which a report may and a step may not.
    return value.item() if isinstance(value, Tensor) else value


def make_row(
    index: int,
    group: dict[str, Any],
    decision: Decision,
    form: Form | None,
    param: Tensor,
) -> Row:
    """Join one decision with what its group and the parameter say now."""
    shape = _shape(decision.shape, param)
    return Row(
        group=index,
        name=decision.telling_name,
        shape=shape,
        numel=shape.numel(),
        lr=_number(group["lr"]),
        weight_decay=_number(group["weight_decay"]) * decision.decay.multiplier,
        form=form,
        reason=decision.reason,
        requires_grad=param.requires_grad,
        owner=decision.kinds[0].rpartition(".")[2] if decision.kinds else "",
        target=decision.decay.target,
        lr0=decision.terms.lr0,
    )


def _shape(decided: torch.Size, param: Tensor) -> torch.Size:
    """Return the shape that was decided on, or that of a lazy parameter since then."""
    # Shapes of lazy parameters come with the first batch, after the decision.
    had_none = decided == (0,) and not is_lazy(param)
    return param.shape if had_none and not _torch.flattened([param]) else decided


def make_report(
    param_groups: Sequence[dict[str, Any]],
    decided: Iterable[Sequence[Decision]],
    default_form: Callable[[dict[str, Any]], Form | None],
) -> DecayReport:
    """Join decisions with what the groups say now."""
    rows = [
        make_row(index, group, decision, decision.decay.form or default, param)
        for index, (group, decisions) in enumerate(
            zip(param_groups, decided, strict=True)
        )
        for default in [default_form(group)]
        for param, decision in zip(group["params"], decisions)
    ]
    return DecayReport(tuple(rows))


PLURALS = {"norm": "norms", "bias": "biases", "weight": "weights"}
# Classes of torch whose decay is L2, and those whose groups do not say otherwise.
L2_CLASSES = ("SGD", "Adam", "Adagrad", "Adadelta", "Adamax", "ASGD", "RMSprop")
DECOUPLED_CLASSES = ("AdamW", "Adafactor", "Muon")


class Groups(Protocol):
    """What a report needs of an optimizer."""

    param_groups: Any


def decay_report(
    optimizer: Groups, model: nn.Module | Sequence[nn.Module] | None = None
) -> DecayReport:
    """Tell what really decays in a training, whatever the optimizer.

    The reason of a row is what the parameter is: ``norm``, ``bias``, ``embedding``,
    ``vector`` (fewer than two dimensions) or ``weight``. The last line tells norms
    and biases that decay, weights that do not beside others that do, and parameters
    of the model that train and are in no group.

    Args:
        optimizer: One whose groups have a ``"weight_decay"``: of torch, of another
            library, or of this one, which then tells its own reasons.
        model: The module, or modules, that the parameters live in. Without it, names
            are those of ``named_parameters()`` if the optimizer was given any.

    Returns:
        The report, as that of ``optimizer.decay_report()``.

    Raises:
        TypeError: ``optimizer`` has no groups.
        ValueError: A group of it has no weight decay.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        >>> no_decay = ["bias", "norm.weight"]  # is this list right for the model?
        >>> named = list(model.named_parameters())
        >>> parts = {}
        >>> for name, param in model.named_parameters():
        ...     exempt = any(word in name for word in no_decay)
        ...     parts.setdefault(exempt, []).append(param)
        >>> groups = [{"params": parts[0]}, {"params": parts[1], "weight_decay": 0.0}]
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
    optimizer = _with_groups(optimizer)
    own = getattr(optimizer, "decay_report", None)
    if own is not None:
        report: DecayReport = own()
        return report
    index = ModelIndex(model)
    groups = list(optimizer.param_groups)
    asked = [
        each
        for number, group in enumerate(groups)
        for each in wanted(group["params"], group.get("param_names", ()), number)
    ]
    forms = [form_of_class(optimizer, group) for group in groups]
    rows = [
        _row_without_policy(groups[info.group], forms[info.group], info)
        for info in index.infos(asked)
    ]
    known = {id(each.param) for each in asked}
    trained = [i for i in index.everyone() if i.parameter.requires_grad]
    left_out = [
        info.telling_name for info in trained if id(info.parameter) not in known
    ]
    return DecayReport(tuple(rows), _remark(rows, left_out))


def _with_groups(optimizer: Any) -> Any:
    """Find the optimizer inside wrappers such as Accelerate's."""
    # Accelerate and Lightning call it `optimizer`, fastai `opt`.
    while not hasattr(optimizer, "decay_report"):
        inner = getattr(optimizer, "optimizer", getattr(optimizer, "opt", None))
        if inner is None:
            break
        optimizer = inner
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"`optimizer` must have param_groups, and {received(optimizer)} has none. "
            f"Pass the optimizer first, then the model: decay_report(optimizer, model)."
        )
    require_decay(optimizer, "report")
    return optimizer


def form_of_class(optimizer: Any, group: dict[str, Any]) -> Form | None:
    """Tell the form of torch's classes; others do not say theirs."""
    if "decoupled_weight_decay" in group:
        return "decoupled" if group["decoupled_weight_decay"] else "l2"
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("torch.optim"):
            if cls.__name__ in DECOUPLED_CLASSES:
                return "decoupled"
            return "l2" if cls.__name__ in L2_CLASSES else None
    return None


def _row_without_policy(
    group: dict[str, Any], form: Form | None, info: ParameterInfo
) -> Row:
    shape = shape_now(info.parameter) if info.shape is None else info.shape
    kinds, name = owner_kinds(info), info.telling_name
    decision = Decision(FULL, kind_of(info), name, shape, kinds)
    return make_row(info.group, group, decision, form, info.parameter)


def _remark(rows: Sequence[Row], left_out: Sequence[str | None]) -> str:
    """Say in one line what looks wrong with groups that were split by hand."""
    decayed = [row for row in rows if row.fate == "decayed"]
    wrong = [
        (kind, "decays", "decay", [row.name for row in decayed if row.reason == kind])
        for kind in ("norm", "bias")
    ]
    if decayed:
        exempt = [r.name for r in rows if r.fate == "exempt" and r.reason == "weight"]
        wrong.append(("weight", "does not decay", "do not decay", exempt))
    told = [
        f"{amount(len(names), kind, PLURALS[kind])} "
        f"{one if len(names) == 1 else several} ({_first_names(names)})"
        for kind, one, several, names in wrong
        if names
    ]
    if left_out:
        verb = "trains and is" if len(left_out) == 1 else "train and are"
        told.append(
            f"{amount(len(left_out), 'parameter')} {verb} in no group "
            f"({_first_names(left_out)})"
        )
    return f"looks wrong: {'; '.join(told)}" if told else ""


def _first_names(names: Sequence[str | None]) -> str:
    first = repr(names[0]) if names[0] else "without a name"
    return first if len(names) == 1 else f"{first} and {len(names) - 1:,} more"
