"""The decay report: what will decay, how much and why, before training starts."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib import import_module
from itertools import chain, repeat
from typing import Any, TypeVar

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from selective_optim import _torch
from selective_optim._text import aligned, param_ids, shortened
from selective_optim.decay import FORMS, Decision, Form, Target, target_text
from selective_optim.parameters import (
    Asked,
    ModelIndex,
    ParameterInfo,
    index_of,
    shape_now,
    wanted,
)
from selective_optim.policies.decide import NO_POLICY, decide
from selective_optim.policies.predicates import is_bias
from selective_optim.policies.recognition import kind_of

Group = dict[str, Any]
_T = TypeVar("_T")
NUMBERS = ("group", "lr", "decay", "measured", "timescale", "tensors", "elements")
MANY_GROUPS = 8  # more are summed up together: a group per layer would fill pages
PAGE = 100  # columns of a printed table
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
        weight_decay: Effective decay, ``group["weight_decay"] * multiplier``, or the
            fixed one. A frozen parameter has the one that it would have.
        form: ``"l2"``, ``"decoupled"`` or another of ``policies.form``; ``None`` if
            the optimizer will decide, or does not say.
        reason: The selector that decided. Without a policy, the kind of parameter:
            norm, bias, embedding, vector or weight.
        requires_grad: Whether it trains; a frozen parameter does not decay.
        owner: Class name of the module that holds it; empty where none is known.
        target: What it decays towards: a number, or ``"init"``; ``None`` is 0.
        lr0: The rate that its training began with, where its form needs that.
        left_over: Whether it is frozen and has a gradient, by which it decays.
        role: What it is: ``"norm"``, ``"norm's bias"``, ``"bias"``, ``"embedding"``,
            ``"vector"`` or ``"weight"``.
        decided: Whether a policy decided.
        route: What steps it, if the report is of several: a route of ``Routed``, or a
            class.
        applied: Whether a step decays it, if that was measured.
        measured: By how much, on the scale of ``weight_decay``, if that was measured
            and the decay moves the parameter directly.
        fixed: Its decay if the policy fixed that, whatever the group says.
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
    left_over: bool = False
    role: str = field(default="", compare=False)  # less is known after unpickling
    decided: bool = False
    route: str = ""
    applied: bool | None = None
    measured: float | None = None
    fixed: float | None = None

    @property
    def fate(self) -> str:
        """``"decayed"``, ``"exempt"`` or ``"frozen"``."""
        if not (self.requires_grad or self.left_over):
            return "frozen"
        return "decayed" if self.weight_decay else "exempt"

    @property
    def effect(self) -> str:
        if self.fate != "decayed":
            return self.fate
        form = self.form or "default"
        return f"{form} towards {target_text(self.target)}" if self.target else form

    @property
    def timescale(self) -> float | None:
        """Steps in which decoupled decay shrinks a weight to 1/e: ``1 / (lr * wd)``."""
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


@dataclass(frozen=True, repr=False)
class DecayReport:
    """One record per parameter in ``rows``; prints as a table by group and reason.

    The timescale is ``1 / (lr * decay)`` steps, at the present rate. After that many
    steps 37 % of a weight is left if its gradients are 0.

    ``len``, iteration and an index read the rows. ``report["head.bias"]`` is the row of
    that name.

    Args:
        rows: The records.
        remark: Last line, which names what looks wrong.

    Example:
        >>> from selective_optim import AdamW
        >>> model = torch.nn.Linear(3, 2)
        >>> print(AdamW(model, weight_decay=0.1, wd_policy="no_bias").decay_report())
        group  reason              lr  decay  form          timescale  tensors  elements
            0  decays in full   0.001    0.1  decoupled  10,000 steps        1         6
            0  exclude is_bias  0.001      0  exempt                         1         2
        decayed: 1 tensor, 6 elements; exempt: 1 tensor, 2 elements
    """

    rows: tuple[Row, ...]
    remark: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, key: Any) -> Any:
        by_name = {row.name: row for row in self.rows[::-1]}
        return by_name[key] if isinstance(key, str) else self.rows[key]

    def __repr__(self) -> str:
        return f"DecayReport({self.summary()})"

    def _by_fate(self) -> dict[str, list[Row]]:
        return {fate: [r for r in self.rows if r.fate == fate] for fate in COLORS}

    def table(self) -> list[tuple[str, ...]]:
        """Sum the rows up by group, reason, decay and form, below a line of headers.

        Beyond eight groups, those that share reason and form are one line, with the
        range of their rates and decays. Columns without an entry are left out.
        """
        # Layerwise groups differ in rate alone, and would fill a page.
        many = len({row.group for row in self.rows}) > MANY_GROUPS

        def line_of(row: Row) -> tuple[Any, ...]:
            group = () if many else (row.group, row.weight_decay)
            return (row.reason, row.effect, row.route, row.applied, *group)

        lines = [_line(rows) for rows in grouped(self.rows, line_of).values()]
        columns = lines[0] if lines else ()
        headers = tuple(key for key in columns if any(line[key] for line in lines))
        return [headers, *(tuple(line[key] for key in headers) for line in lines)]

    def summary(self) -> str:
        """Say in one line how much decays."""
        by_fate = self._by_fate()
        shown = [fate for fate in by_fate if by_fate[fate] or fate != "frozen"]
        return "; ".join(f"{fate}: {_amount(by_fate[fate])}" for fate in shown)

    def __str__(self) -> str:
        table = self.table()
        # Longer reasons are cut; rows have them whole.
        if (over := max(map(len, aligned(table))) - PAGE) > 0:
            at = table[0].index("reason")
            room = max(20, max(len(line[at]) for line in table) - over)
            table = [(*r[:at], shortened(r[at], room), *r[at + 1 :]) for r in table]
        right = [i for i, key in enumerate(table[0]) if key in NUMBERS]
        lines = [*aligned(table, right), self.summary(), self.remark]
        return "\n".join(filter(None, lines))

    @property
    def agrees(self) -> bool:
        """Whether nothing looks wrong."""
        return not self.remark.startswith(WRONG)

    def as_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers, ready for JSON."""
        sums = {fate: _sums(rows) for fate, rows in self._by_fate().items()}
        return {"rows": plain(self.rows), **sums, "remark": self.remark}

    def _repr_html_(self) -> str:
        headers, *lines = self.table()
        sides = ["right" if key in NUMBERS else "left" for key in headers]

        def html_row(tag: str, line: Iterable[str]) -> str:
            cells = [
                f'<{tag} style="text-align: {side}">{escape(text)}</{tag}>'
                for side, text in zip(sides, line)
            ]
            return f"<tr>{''.join(cells)}</tr>"

        body = "".join(html_row("td", line) for line in lines)
        inside = f"<thead>{html_row('th', headers)}</thead>\n<tbody>{body}</tbody>"
        caption = escape("; ".join(filter(None, [self.summary(), self.remark])))
        return f"<table>\n<caption>{caption}</caption>\n{inside}\n</table>"

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
        if ax is None:
            size = (8, 1.8 + 0.35 * len(kinds))
            try:
                pyplot = import_module("matplotlib.pyplot")
            except ImportError as error:
                raise ImportError(
                    "`plot` draws with matplotlib, which is not installed. "
                    "Type pip install matplotlib, or pass axes of your own as ax."
                ) from error
            ax = pyplot.subplots(figsize=size, layout="constrained")[1]
        places, left = range(len(kinds)), [0.0] * len(kinds)
        for fate in [fate for fate, rows in self._by_fate().items() if rows]:
            shares = [_share(rows, fate) for rows in kinds.values()]
            ax.barh(places, shares, 0.7, left, color=COLORS[fate], label=fate)
            left = [a + b for a, b in zip(left, shares)]
        for place, rows in zip(places, kinds.values()):
            ax.text(102, place, _amount(rows), va="center", fontsize="small")
        ax.set_yticks(places, list(kinds))
        ax.invert_yaxis()
        ax.set_xlim(0, 100)
        ax.set_xlabel("share of the elements of a kind (%)")
        ax.set_title(self.summary().replace("; ", "\n"), loc="left", fontsize="medium")
        ax.spines[["top", "right"]].set_visible(False)
        anchor = {"loc": "upper left", "bbox_to_anchor": (0, -0.5 / (len(kinds) + 1))}
        ax.legend(**anchor, borderaxespad=2, ncols=3, frameon=False)
        return ax


def plain(records: Iterable[Any]) -> list[dict[str, Any]]:
    """Make dicts of records, ready for JSON."""
    return [{**asdict(record), "shape": list(record.shape)} for record in records]


def grouped(items: Iterable[_T], key: Callable[[_T], Any]) -> dict[Any, list[_T]]:
    """Collect the items of each key; keys are in the order of their first items."""
    groups: dict[Any, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _sums(rows: Sequence[Row]) -> dict[str, int]:
    return {"tensors": len(rows), "elements": sum(row.numel for row in rows)}


def _by_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    kinds = grouped(rows, lambda row: row.kind)
    ordered = sorted(kinds.items(), key=lambda item: -_sums(item[1])["elements"])
    if len(ordered) > MANY_BARS:
        small = ordered[MANY_BARS - 1 :]
        merged = list(chain(*[kind_rows for _, kind_rows in small]))
        ordered[MANY_BARS - 1 :] = [(f"{len(small)} other kinds", merged)]
    return dict(ordered)


def _share(rows: Sequence[Row], fate: str) -> float:
    elements = sum(row.numel for row in rows if row.fate == fate)
    return 100 * elements / (_sums(rows)["elements"] or 1)


def amount(count: int, noun: str) -> str:
    """Count a noun: ``1 tensor``, ``1,000 tensors``, ``2 biases``."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def _amount(rows: Sequence[Row]) -> str:
    return ", ".join(amount(n, key.rstrip("s")) for key, n in _sums(rows).items())


def _line(rows: Sequence[Row]) -> dict[str, str]:
    first = rows[0]
    measured = _span(row.measured for row in rows)
    return {
        "group": _runs({row.group for row in rows}),
        "route": first.route,
        "reason": first.reason,
        "lr": _span(row.lr for row in rows),
        "decay": "-" if first.fate == "frozen" else _span(r.weight_decay for r in rows),
        "form": first.effect,
        "measured": measured or ("some" if first.applied else ""),
        "timescale": _span((row.timescale for row in rows), ",.0f", " steps"),
        **{key: f"{count:,}" for key, count in _sums(rows).items()},
    }


def _runs(groups: set[int]) -> str:
    # {0, 1, 2, 5} as "0-2, 5", and more ranges as "4 groups".
    starts = sorted(group for group in groups if group - 1 not in groups)
    ends = sorted(group for group in groups if group + 1 not in groups)
    if len(starts) > FEW_RUNS:
        return f"{len(groups)} groups"
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in zip(starts, ends))


def _span(values: Iterable[float | None], kind: str = "g", unit: str = "") -> str:
    numbers = [n for n in values if n is not None and not math.isnan(n)]
    ends = [f"{end(numbers):{kind}}" for end in (min, max) if numbers]
    return " to ".join(dict.fromkeys(ends)) + unit * bool(ends)


def make_rows(
    groups: Sequence[Group],
    decided: Sequence[Sequence[Decision | None]] | None,
    form_of: Callable[[Group], Form | None],
    index: ModelIndex,
) -> list[Row]:
    """Join what was decided, if anything was, with what groups and modules are now."""
    decided = decided or [[None] * len(group["params"]) for group in groups]
    asked = list[Asked]()
    for number, (group, decisions) in enumerate(zip(groups, decided, strict=True)):
        names = group.get("param_names") or repeat(None)
        names = [d.telling_name if d else name for d, name in zip(decisions, names)]
        asked += wanted(group["params"], names, number)
    pairs = zip(index.infos(asked), chain(*decided))
    forms = [form_of(group) for group in groups]
    return [_row(i, groups[i.group], d, forms[i.group]) for i, d in pairs]


def _row(
    info: ParameterInfo, group: Group, decided: Decision | None, form: Form | None
) -> Row:
    kind, param = kind_of(info), info.parameter
    # Where nothing was decided, all decay as the group says, for what they are.
    decision = decided or decide(None, [info])[0]._replace(reason=kind)
    by_policy = decided is not None and decided.reason != NO_POLICY
    shape, decay = decision.shape, decision.decay
    # Shapes of lazy parameters come with the first batch, after the decision.
    if shape == (0,) and not is_lazy(param) and not _torch.is_flattened(param):
        shape = param.shape
    # Reading a tensor waits for the device. A report may wait, a step may not.
    wd = float(decay.of(group["weight_decay"]))
    return Row(
        group=info.group,
        name=decision.telling_name,
        shape=shape,
        numel=shape.numel(),
        lr=float(group.get("lr", math.nan)),
        weight_decay=wd,
        form=decay.form or form,
        reason=ZERO if by_policy and decay.multiplier and not wd else decision.reason,
        requires_grad=param.requires_grad,
        owner=decision.kinds[0].rpartition(".")[2] if decision.kinds else "",
        target=decay.target,
        lr0=decision.decay_key.lr0,
        # torch steps every parameter that has a gradient.
        left_over=not param.requires_grad and param.grad is not None,
        role="norm's bias" if kind == "norm" and is_bias.matches(info) else kind,
        decided=by_policy,
        route=str(group.get("route", "")),  # as Routed writes it
        fixed=decay.fixed,
    )


ZERO = "weight_decay=0"  # the reason where a policy decays and a group does not
# Classes of torch, whose groups do not always say what their decay is.
L2_CLASSES = ("SGD", "Adam", "Adagrad", "Adadelta", "Adamax", "ASGD", "RMSprop")
CLASS_FORMS: dict[str, Form] = {
    **dict.fromkeys(L2_CLASSES, "l2"),
    **dict.fromkeys(("AdamW", "Adafactor", "Muon"), "decoupled"),
}


def form_of_class(optimizer: Any, group: Group) -> Form | None:
    """Tell the form of torch's classes; others do not say theirs."""
    if "decoupled_weight_decay" in group:
        return "decoupled" if group["decoupled_weight_decay"] else "l2"
    classes = type(optimizer).__mro__
    torchs = (c.__name__ for c in classes if c.__module__.startswith("torch.optim"))
    return CLASS_FORMS.get(next(torchs, ""))


WRONG, NOTE = "looks wrong: ", "note: "


def report_on(
    rows: Sequence[Row], groups: Sequence[Group], index: ModelIndex, *remarks: str
) -> DecayReport:
    """Report on rows; the remark joins others to what looks wrong in the rows."""
    wrong = [*_split_wrongly(rows), _left_out(index, groups), *_not_as_promised(rows)]
    lines = [line for text in (*wrong, *remarks) for line in text.splitlines()]
    names = dict.fromkeys(type(module).__name__ for module in index.discovered)
    classes = ", ".join(names)
    if classes:
        lines.append(f"{NOTE}known from {classes}, found alive with these parameters")
    notes = [line for line in lines if line.startswith(NOTE)]
    clauses = "; ".join(line.removeprefix(WRONG) for line in lines if line not in notes)
    distinct = "; ".join(dict.fromkeys(clauses.split("; ")))
    first = [WRONG + distinct] if distinct else []
    return DecayReport(tuple(rows), "\n".join([*first, *dict.fromkeys(notes)]))


def _clause(names: Sequence[str | None], noun: str, verbs: str) -> str:
    """Tell what some parameters do, of ``decays/decay`` the one or the other."""
    if not names:
        return ""
    verbs = re.sub(r"(\w+)/(\w+)", r"\2" if names[1:] else r"\1", verbs)
    first = repr(names[0]) if names[0] else "without a name"
    more = f" and {len(names) - 1:,} more" if names[1:] else ""
    return f"{amount(len(names), noun)} {verbs} ({first}{more})"


def _split_wrongly(rows: Sequence[Row]) -> Iterator[str]:
    # With a policy all norms may decay, but not some while others are exempt.
    decayed = [r for r in rows if r.fate == "decayed" and r.applied is not False]
    exempt = [row for row in rows if row.fate == "exempt" and row.reason != ZERO]
    # A selector that also exempts weights, such as "head.*", is no rule for biases.
    broad = {row.reason for row in exempt if row.role in ("weight", "embedding")}
    ruled = {row.role for row in exempt if row.decided and row.reason not in broad}
    for kind in ("norm", "bias"):
        to_zero = [r for r in decayed if r.role.startswith(kind) and r.target is None]
        wrong = [row for row in to_zero if not row.decided or row.role in ruled]
        others = ", others do not" if any(row.decided for row in wrong) else ""
        yield _clause([row.name for row in wrong], kind, f"decays/decay{others}")
    routes = {row.route for row in decayed if not row.decided}
    weights = [r for r in exempt if r.role == "weight" and not r.decided]
    kept = [row.name for row in weights if row.route in routes]
    yield _clause(kept, "weight", "does/do not decay")
    left = [row.name for row in decayed if row.left_over]
    yield _clause(left, "frozen parameter", "has/have a gradient left and decays/decay")


def _not_as_promised(rows: Sequence[Row]) -> Iterator[str]:
    decayed = [r for r in rows if r.fate == "decayed" and r.applied is not None]
    never = [row.name for row in decayed if not row.applied]
    yield _clause(never, "parameter", "is/are decayed by no step")
    # The first step of momentum may add to L2, which is no other decay.
    direct = [row for row in decayed if row.measured and row.form != "l2"]
    ratios = [((row.measured or 0) / row.weight_decay, row.name) for row in direct]
    deviating = [name for ratio, name in ratios if abs(ratio - 1) > 0.02]
    yield _clause(deviating, "parameter", "decays/decay at another rate")


def _left_out(index: ModelIndex, groups: Sequence[Group]) -> str:
    shapes = {id(p): shape_now(p) for group in groups for p in group["params"]}
    in_modules = {id(info.parameter) for info in index.everyone()}
    foreign = {shape for key, shape in shapes.items() if key not in in_modules}
    missing: dict[int, ParameterInfo] = {}
    for module in index.passed:
        trained = [i for i in index_of(module).everyone() if i.parameter.requires_grad]
        outside = {id(i.parameter): i for i in trained if id(i.parameter) not in shapes}
        outside_shapes = {shape_now(info.parameter) for info in outside.values()}
        # A module of which there is nothing was replaced by the flat tensors of an
        # engine, or was met in a group that was refused.
        absent = len(outside) == len(trained) and foreign.isdisjoint(outside_shapes)
        if not (absent and (foreign or not index.explicit)):
            missing |= outside
    if not missing:
        return ""
    optimizers = [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
    stepped = set[int]().union(*map(param_ids, optimizers))
    names = [i.telling_name for key, i in missing.items() if key not in stepped]
    return _clause(names, "parameter", "trains/train and is/are in no group")
