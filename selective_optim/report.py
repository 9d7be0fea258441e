"""The decay report: what will decay, how much and why, before training starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from importlib import import_module
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from selective_optim import _torch
from selective_optim._arguments import require_decay
from selective_optim._text import aligned, received
from selective_optim.decay import FORMS, Decision, Form, Target, target_text
from selective_optim.parameters import ModelIndex, wanted
from selective_optim.policies.decide import decide
from selective_optim.policies.selectors import kind_of

Group = dict[str, Any]
# Columns of numbers stand to the right.
NUMBERS = ("group", "lr", "decay", "timescale", "tensors", "elements")
MANY_GROUPS = 8  # more are summed up together: a group per layer would fill pages
FEW_RUNS = 3  # group numbers are spelled out up to so many ranges
MANY_BARS = 16  # the rest of the kinds is one bar
COLORS = {"decayed": "C0", "exempt": "C1", "frozen": "0.8"}


@dataclass(frozen=True)
class Row:
    """One parameter: how it decays, and why.

    Args:
        group: Index of its parameter group.
        name: Canonical name, if known. Both halves of weight norm keep names of their
            own, such as ``"0.parametrizations.weight.original0"``.
        shape: Original shape.
        numel: Number of elements.
        lr: Learning rate of the group now; NaN without an optimizer.
        weight_decay: Effective decay, ``group["weight_decay"] * multiplier``. A frozen
            parameter has the one that it would have.
        form: ``"l2"``, ``"decoupled"`` or another of ``policies.form``; ``None`` if
            the optimizer will decide, or does not say.
        reason: The selector that decided. Without a policy, the kind of parameter:
            norm, bias, embedding, vector or weight.
        requires_grad: Whether it trains; a frozen parameter does not decay.
        owner: Class name of the module that holds it; empty if none is known.
        target: Value that it decays towards: a number, or ``"init"``; ``None`` is 0.
        lr0: The rate that its training began with, if its form needs it.
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
        """The fate of the parameter: ``decayed``, ``exempt`` or ``frozen``."""
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
        """Its class and attribute, as ``Linear.weight``; else the reason."""
        leaf = self.name.rpartition(".")[2] if self.name else ""
        return f"{self.owner}.{leaf}" if self.owner and leaf else self.reason


@dataclass(frozen=True)
class DecayReport:
    """One record per parameter in ``rows``; prints as a table by group and reason.

    The timescale is ``1 / (lr * decay)`` steps, at the present rate. After so many
    steps decoupled decay has left 37 % of a weight that no gradient renews.

    Args:
        rows: The records.
        remark: Line at the end that tells if something looks wrong.

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
        """Sum the rows up by group, reason, decay and form, below a line of headers.

        Beyond eight groups, those that share reason and form are one line, with the
        range of their rates and decays. Columns without an entry are left out.
        """
        # Layerwise groups differ in rate alone, and would fill a page.
        many = len({row.group for row in self.rows}) > MANY_GROUPS
        sums: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            group = () if many else (row.group, row.weight_decay)
            sums.setdefault((row.reason, row.effect, *group), []).append(row)
        lines = [_line(rows) for rows in sums.values()]
        headers = lines[0] if lines else ()
        known = [key for key in headers if any(line[key] for line in lines)]
        return [tuple(known), *(tuple(line[key] for key in known) for line in lines)]

    def summary(self) -> str:
        """Say in one line how much decays."""
        parts = {fate: [r for r in self.rows if r.fate == fate] for fate in COLORS}
        if not parts["frozen"]:
            del parts["frozen"]
        return "; ".join(f"{fate}: {_amount(rows)}" for fate, rows in parts.items())

    def __str__(self) -> str:
        table = self.table()
        right = [i for i, key in enumerate(table[0]) if key in NUMBERS]
        lines = [*aligned(table, right), self.summary(), self.remark]
        return "\n".join(filter(None, lines))

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        headers, *lines = self.table()
        sides = ["right" if key in NUMBERS else "left" for key in headers]
        head, *body = [
            f"<tr>{''.join(_cell(tag, *pair) for pair in zip(sides, cells))}</tr>"
            for tag, cells in [("th", headers), *(("td", line) for line in lines)]
        ]
        told = escape("; ".join(filter(None, [self.summary(), self.remark])))
        parts = f"<thead>{head}</thead>\n<tbody>{''.join(body)}</tbody>"
        return f"<table>\n<caption>{told}</caption>\n{parts}\n</table>"

    def plot(self, ax: Any = None) -> Any:
        """Draw the share of each kind, as ``Linear.weight``, that decays, with counts.

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
        for fate in [f for f in COLORS if any(row.fate == f for row in self.rows)]:
            sizes = [
                (_elements(rows, fate), _elements(rows)) for rows in kinds.values()
            ]
            shares = [100 * part / (whole or 1) for part, whole in sizes]
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


def _elements(rows: Iterable[Row], fate: str | None = None) -> int:
    return sum(row.numel for row in rows if fate in (None, row.fate))


def _by_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Collect rows by kind, the largest first, and the smallest under one name."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    ordered = sorted(kinds.items(), key=lambda item: -_elements(item[1]))
    if len(ordered) > MANY_BARS:
        rest = ordered[MANY_BARS - 1 :]
        merged = [row for _, own in rest for row in own]
        ordered[MANY_BARS - 1 :] = [(f"{len(rest)} other kinds", merged)]
    return dict(ordered)


def amount(count: int, noun: str) -> str:
    """Count a noun: ``1 tensor``, ``1,000 tensors``, ``2 biases``."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def _amount(rows: Sequence[Row]) -> str:
    return f"{amount(len(rows), 'tensor')}, {amount(_elements(rows), 'element')}"


def _line(rows: Sequence[Row]) -> dict[str, str]:
    first = rows[0]
    timescales = [row.timescale for row in rows if row.timescale is not None]
    decays = [row.weight_decay for row in rows if first.fate != "frozen"]
    return {
        "group": _runs({row.group for row in rows}),
        "reason": first.reason,
        "lr": _span([row.lr for row in rows if not math.isnan(row.lr)]),
        "decay": _span(decays) or "-",
        "form": first.effect,
        "timescale": _span(timescales, ",.0f", " steps"),
        "tensors": f"{len(rows):,}",
        "elements": f"{_elements(rows):,}",
    }


def _runs(groups: set[int]) -> str:
    """Write ``{0, 1, 2, 5}`` as ``0-2, 5``, and more ranges as ``4 groups``."""
    starts = sorted(group for group in groups if group - 1 not in groups)
    ends = sorted(group for group in groups if group + 1 not in groups)
    if len(starts) > FEW_RUNS:
        return f"{len(groups)} groups"
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in zip(starts, ends))


def _span(values: Sequence[float], kind: str = "g", unit: str = "") -> str:
    """Write the least and the greatest value, once where they read alike."""
    ends = [f"{end(values):{kind}}" for end in (min, max) if values]
    return " to ".join(dict.fromkeys(ends)) + unit * bool(ends)


def _cell(tag: str, side: str, text: str) -> str:
    return f'<{tag} style="text-align: {side}">{escape(text)}</{tag}>'


def _new_axes(bars: int) -> Any:
    try:
        pyplot = import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError(
            "`plot` draws with matplotlib, which is not installed. "
            "Type pip install matplotlib, or pass axes of your own as ax."
        ) from error
    return pyplot.subplots(figsize=(8, 1.8 + 0.35 * bars), layout="constrained")[1]


def make_row(
    index: int, group: Group, decision: Decision, form: Form | None, param: Tensor
) -> Row:
    """Join one decision with what its group and the parameter say now."""
    shape = decision.shape
    # Shapes of lazy parameters come with the first batch, after the decision.
    if shape == (0,) and not is_lazy(param) and not _torch.flattened([param]):
        shape = param.shape
    return Row(
        group=index,
        name=decision.telling_name,
        shape=shape,
        numel=shape.numel(),
        # A tensor waits for the device, which a report may and a step may not.
        lr=float(group["lr"]),
        weight_decay=float(group["weight_decay"]) * decision.decay.multiplier,
        form=form,
        reason=decision.reason,
        requires_grad=param.requires_grad,
        owner=decision.kinds[0].rpartition(".")[2] if decision.kinds else "",
        target=decision.decay.target,
        lr0=decision.decay_key.lr0,
    )


def make_report(
    groups: Sequence[Group],
    decided: Iterable[Sequence[Decision]],
    form_of: Callable[[Group], Form | None],
) -> DecayReport:
    """Join decisions with what the groups say now."""
    rows = [
        make_row(index, group, decision, decision.decay.form or form_of(group), param)
        for index, (group, own) in enumerate(zip(groups, decided, strict=True))
        for param, decision in zip(group["params"], own)
    ]
    return DecayReport(tuple(rows))


# What looks wrong with hand-split groups: its fate, and how one and several read.
MISTAKES = {
    "norm": ("decayed", "decays", "decay"),
    "bias": ("decayed", "decays", "decay"),
    "weight": ("exempt", "does not decay", "do not decay"),
}
# Classes of torch, whose groups do not always say what their decay is.
L2_CLASSES = ("SGD", "Adam", "Adagrad", "Adadelta", "Adamax", "ASGD", "RMSprop")
CLASS_FORMS: dict[str, Form] = {
    **dict.fromkeys(L2_CLASSES, "l2"),
    **dict.fromkeys(("AdamW", "Adafactor", "Muon"), "decoupled"),
}


def decay_report(
    optimizer: Any, model: nn.Module | Sequence[nn.Module] | None = None
) -> DecayReport:
    """Tell what really decays in a training, whatever the optimizer.

    The reason of a row is the kind of parameter: ``norm``, ``bias``, ``embedding``,
    ``vector`` (fewer than two dimensions) or ``weight``. The last line tells if
    something looks wrong, and which trained parameters of the model are in no group.

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
    optimizer = _with_groups(optimizer)
    own = getattr(optimizer, "decay_report", None)
    if own is not None:
        report: DecayReport = own()
        return report
    index, groups = ModelIndex(model), list(optimizer.param_groups)
    asked = [
        wanted(group["params"], group.get("param_names", ()), number)
        for number, group in enumerate(groups)
    ]
    infos = iter(index.infos(list(chain(*asked))))
    # Nothing was decided: each decays as its group says, and the reason is its kind.
    decided = [
        [d._replace(reason=kind_of(i)) for i in own for d in decide(None, [i])]
        for own in (list(islice(infos, len(group))) for group in asked)
    ]
    report = make_report(groups, decided, partial(form_of_class, optimizer))
    known = {id(each.param) for each in chain(*asked)}
    left_out = [
        info.telling_name
        for info in index.everyone()
        if info.parameter.requires_grad and id(info.parameter) not in known
    ]
    return replace(report, remark=_remark(report.rows, left_out))


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


def form_of_class(optimizer: Any, group: Group) -> Form | None:
    """Tell the form of torch's classes; others do not say theirs."""
    if "decoupled_weight_decay" in group:
        return "decoupled" if group["decoupled_weight_decay"] else "l2"
    classes = type(optimizer).__mro__
    torchs = (c.__name__ for c in classes if c.__module__.startswith("torch.optim"))
    return CLASS_FORMS.get(next(torchs, ""))


def _remark(rows: Sequence[Row], left_out: Sequence[str | None]) -> str:
    """Say in one line what looks wrong with groups that were split by hand."""
    wrong = {
        kind: ([r.name for r in rows if (r.reason, r.fate) == (kind, fate)], *verbs)
        for kind, (fate, *verbs) in MISTAKES.items()
    }
    if all(row.fate != "decayed" for row in rows):
        del wrong["weight"]
    alone = ("trains and is in no group", "train and are in no group")
    wrong["parameter"] = (list(left_out), *alone)
    told = [
        f"{amount(len(names), kind)} {one if len(names) == 1 else several} "
        f"({_first_names(names)})"
        for kind, (names, one, several) in wrong.items()
        if names
    ]
    return f"looks wrong: {'; '.join(told)}" if told else ""


def _first_names(names: Sequence[str | None]) -> str:
    first = repr(names[0]) if names[0] else "without a name"
    return first if len(names) == 1 else f"{first} and {len(names) - 1:,} more"
