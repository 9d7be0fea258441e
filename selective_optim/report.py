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
from typing import Any

import torch
from torch.nn.parameter import is_lazy

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

    def _fates(self) -> dict[str, list[Row]]:
        return {fate: [r for r in self.rows if r.fate == fate] for fate in COLORS}

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
            key = (row.reason, row.effect, row.route, row.applied, *group)
            sums.setdefault(key, []).append(row)
        lines = [_line(rows) for rows in sums.values()]
        headers = lines[0] if lines else ()
        known = [key for key in headers if any(line[key] for line in lines)]
        return [tuple(known), *(tuple(line[key] for key in known) for line in lines)]

    def summary(self) -> str:
        """Say in one line how much decays."""
        fates = self._fates().items()
        told = [f"{f}: {_amount(own)}" for f, own in fates if own or f != "frozen"]
        return "; ".join(told)

    def __str__(self) -> str:
        table = self.table()
        # Longer reasons are cut; rows have them whole.
        if (over := max(map(len, aligned(table))) - PAGE) > 0:
            at = table[0].index("reason")
            room = max(20, max(len(row[at]) for row in table) - over)
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
        sums = {fate: _sums(own) for fate, own in self._fates().items()}
        return {"rows": plain(self.rows), **sums, "remark": self.remark}

    def _repr_html_(self) -> str:
        headers, *lines = self.table()
        sides = ["right" if key in NUMBERS else "left" for key in headers]

        def row(tag: str, cells: Iterable[str]) -> str:
            told = [
                f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>'
                for side, cell in zip(sides, cells)
            ]
            return f"<tr>{''.join(told)}</tr>"

        body = "".join(row("td", line) for line in lines)
        told = escape("; ".join(filter(None, [self.summary(), self.remark])))
        parts = f"<thead>{row('th', headers)}</thead>\n<tbody>{body}</tbody>"
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
        if ax is None:
            size = (8, 1.8 + 0.35 * len(kinds))
            ax = _pyplot().subplots(figsize=size, layout="constrained")[1]
        left = [0.0] * len(kinds)
        for fate in [fate for fate, rows in self._fates().items() if rows]:
            shares = [_share(rows, fate) for rows in kinds.values()]
            bar = {"color": COLORS[fate], "label": fate}
            ax.barh(range(len(kinds)), shares, 0.7, left, **bar)
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


def plain(records: Iterable[Any]) -> list[dict[str, Any]]:
    """Make dicts of records, ready for JSON."""
    return [{**asdict(each), "shape": list(each.shape)} for each in records]


def _sums(rows: Sequence[Row]) -> dict[str, int]:
    return {"tensors": len(rows), "elements": sum(row.numel for row in rows)}


def _by_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    ordered = sorted(kinds.items(), key=lambda item: -_sums(item[1])["elements"])
    if len(ordered) > MANY_BARS:
        rest = ordered[MANY_BARS - 1 :]
        merged = [row for _, own in rest for row in own]
        ordered[MANY_BARS - 1 :] = [(f"{len(rest)} other kinds", merged)]
    return dict(ordered)


def _share(rows: Sequence[Row], fate: str) -> float:
    own = _sums([row for row in rows if row.fate == fate])
    return 100 * own["elements"] / (_sums(rows)["elements"] or 1)


def amount(count: int, noun: str) -> str:
    """Count a noun: ``1 tensor``, ``1,000 tensors``, ``2 biases``."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def _amount(rows: Sequence[Row]) -> str:
    return ", ".join(amount(n, key.rstrip("s")) for key, n in _sums(rows).items())


def _line(rows: Sequence[Row]) -> dict[str, str]:
    first = rows[0]
    decay = _span(row.weight_decay for row in rows)
    measured = _span(row.measured for row in rows)
    return {
        "group": _runs({row.group for row in rows}),
        "route": first.route,
        "reason": first.reason,
        "lr": _span(row.lr for row in rows),
        "decay": "-" if first.fate == "frozen" else decay,
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
    known = [value for value in values if value is not None and not math.isnan(value)]
    ends = [f"{end(known):{kind}}" for end in (min, max) if known]
    return " to ".join(dict.fromkeys(ends)) + unit * bool(ends)


def _pyplot() -> Any:
    try:
        return import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError(
            "`plot` draws with matplotlib, which is not installed. "
            "Type pip install matplotlib, or pass axes of your own as ax."
        ) from error


def make_rows(
    groups: Sequence[Group],
    decided: Sequence[Sequence[Decision | None]] | None,
    form_of: Callable[[Group], Form | None],
    index: ModelIndex,
) -> list[Row]:
    """Join what was decided, if anything was, with what groups and modules are now."""
    decided = decided or [[None] * len(group["params"]) for group in groups]
    asked = list[Asked]()
    for number, (group, own) in enumerate(zip(groups, decided, strict=True)):
        names = group.get("param_names") or repeat(None)
        names = [known.telling_name if known else n for known, n in zip(own, names)]
        asked += wanted(group["params"], names, number)
    pairs = zip(index.infos(asked), chain(*decided))
    forms = [form_of(group) for group in groups]
    return [_row(i, groups[i.group], known, forms[i.group]) for i, known in pairs]


def _row(
    info: ParameterInfo, group: Group, known: Decision | None, form: Form | None
) -> Row:
    kind, param = kind_of(info), info.parameter
    # Where nothing was decided, all decay as the group says, for what they are.
    decision = known or decide(None, [info])[0]._replace(reason=kind)
    by_policy = known is not None and known.reason != NO_POLICY
    shape, decay = decision.shape, decision.decay
    # Shapes of lazy parameters come with the first batch, after the decision.
    if shape == (0,) and not is_lazy(param) and not _torch.flattened([param]):
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


def judged(
    rows: Sequence[Row], groups: Sequence[Group], index: ModelIndex, *told: str
) -> DecayReport:
    """Report on rows, with what looks wrong in them and what else is to be told."""
    names = dict.fromkeys(type(module).__name__ for module in index.discovered)
    found = f"{NOTE}known from {', '.join(names)}, found alive with these parameters"
    wrong = [*_split_wrongly(rows), _left_out(index, groups), *_not_as_promised(rows)]
    remark = _remark_of(*wrong, *told, found if names else "")
    return DecayReport(tuple(rows), remark)


def _remark_of(*told: str) -> str:
    lines = [line for part in told for line in part.splitlines()]
    notes = [line for line in lines if line.startswith(NOTE)]
    parts = [line.removeprefix(WRONG) for line in lines if line not in notes]
    wrong = "; ".join(dict.fromkeys(chain(*[part.split("; ") for part in parts])))
    return "\n".join(filter(None, [wrong and WRONG + wrong, *dict.fromkeys(notes)]))


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
        own = [r for r in decayed if r.role.startswith(kind) and r.target is None]
        wrong = [row for row in own if not row.decided or row.role in ruled]
        others = ", others do not" if any(row.decided for row in wrong) else ""
        yield _clause([row.name for row in wrong], kind, f"decays/decay{others}")
    routes = {row.route for row in decayed if not row.decided}
    weights = [r for r in exempt if r.role == "weight" and not r.decided]
    kept = [row.name for row in weights if row.route in routes]
    yield _clause(kept, "weight", "does/do not decay")
    left = [row.name for row in decayed if row.left_over]
    verbs = "has/have a gradient left and decays/decay"
    yield _clause(left, "frozen parameter", verbs)


def _not_as_promised(rows: Sequence[Row]) -> Iterator[str]:
    known = [row for row in rows if row.fate == "decayed" and row.applied is not None]
    never = [row.name for row in known if not row.applied]
    yield _clause(never, "parameter", "is/are decayed by no step")
    # The first step of momentum may add to L2, which is no other decay.
    direct = [row for row in known if row.measured and row.form != "l2"]
    parts = [((row.measured or 0) / row.weight_decay, row.name) for row in direct]
    other = [name for part, name in parts if abs(part - 1) > 0.02]
    yield _clause(other, "parameter", "decays/decay at another rate")


def _left_out(index: ModelIndex, groups: Sequence[Group]) -> str:
    held = {id(p): shape_now(p) for group in groups for p in group["params"]}
    known = {id(info.parameter) for info in index.everyone()}
    strange = {shape for key, shape in held.items() if key not in known}
    missing: dict[int, ParameterInfo] = {}
    for module in index.passed:
        trained = [i for i in index_of(module).everyone() if i.parameter.requires_grad]
        out = {id(i.parameter): i for i in trained if id(i.parameter) not in held}
        shapes = {shape_now(info.parameter) for info in out.values()}
        # A module of which there is nothing was replaced by the flat tensors of an
        # engine, or was met in a group that was refused.
        absent = len(out) == len(trained) and strange.isdisjoint(shapes)
        if not (absent and (strange or not index.explicit)):
            missing |= out
    if missing:
        kinds = torch.optim.Optimizer
        living = [each for each in gc.get_objects() if issubclass(type(each), kinds)]
        stepped = set[int]().union(*map(param_ids, living))
        missing = {key: info for key, info in missing.items() if key not in stepped}
    names = [info.telling_name for info in missing.values()]
    return _clause(names, "parameter", "trains/train and is/are in no group")
