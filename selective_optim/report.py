"""The decay report: what will decay, how much and why, before training starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import import_module
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from selective_optim._text import aligned
from selective_optim.decay import Decision, Form

HEADERS = ("group", "reason", "decay", "form", "tensors", "elements")
NUMBERS = (0, 2, 4, 5)  # columns that stand to the right
MANY_GROUPS = 8  # more are summed up together: a group per layer would fill pages
FEW_RUNS = 3  # group numbers are spelled out up to so many ranges


@dataclass(frozen=True)
class Row:
    """What happens to one parameter.

    Args:
        group: Index of its parameter group.
        name: Canonical name, or ``None`` where no name is known.
        shape: Original shape.
        numel: Number of elements.
        lr: Learning rate of the group now; NaN where there is no optimizer.
        weight_decay: Effective decay, ``group["weight_decay"] * multiplier``.
        form: ``"l2"`` or ``"decoupled"``; ``None`` where the optimizer will decide.
        reason: The selector that decided.
    """

    group: int
    name: str | None
    shape: torch.Size
    numel: int
    lr: float
    weight_decay: float
    form: Form | None
    reason: str

    @property
    def effect(self) -> str:
        """The form in which the parameter decays, or that it is exempt."""
        return (self.form or "default") if self.weight_decay else "exempt"

    @property
    def module(self) -> str:
        """Top-level module of the parameter; its group where no name is known."""
        return self.name.partition(".")[0] if self.name else f"group {self.group}"


@dataclass(frozen=True)
class DecayReport:
    """One record per parameter in ``rows``; prints as a table by group and reason.

    Example:
        >>> from selective_optim import AdamW
        >>> model = torch.nn.Linear(3, 2)
        >>> print(AdamW(model, weight_decay=0.1, wd_policy="no_bias").decay_report())
        group  reason           decay  form       tensors  elements
            0  no match           0.1  decoupled        1         6
            0  exclude is_bias      0  exempt           1         2
        decayed: 1 tensor, 6 elements; exempt: 1 tensor, 2 elements
    """

    rows: tuple[Row, ...]

    def table(self) -> list[tuple[str, ...]]:
        """Sum the rows up by group, reason, decay and form, in the order of the groups.

        Beyond eight groups, those that share reason and form are one line, with the
        range of their decay.
        """
        many = len({row.group for row in self.rows}) > MANY_GROUPS
        lines: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            group = () if many else (row.group, row.weight_decay)
            lines.setdefault((row.reason, row.effect, *group), []).append(row)
        return [_line(rows) for rows in lines.values()]

    def summary(self) -> str:
        """Say in one line how much decays."""
        decayed = [row for row in self.rows if row.weight_decay]
        exempt = [row for row in self.rows if not row.weight_decay]
        return f"decayed: {_amount(decayed)}; exempt: {_amount(exempt)}"

    def __str__(self) -> str:
        return "\n".join([*aligned([HEADERS, *self.table()], NUMBERS), self.summary()])

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        head = _html_row("th", HEADERS)
        body = "\n".join(_html_row("td", line) for line in self.table())
        caption = f"<caption>{escape(self.summary())}</caption>"
        parts = f"{caption}\n<thead>\n{head}\n</thead>\n<tbody>\n{body}\n</tbody>"
        return f"<table>\n{parts}\n</table>"

    def plot(self, ax: Any = None) -> Any:
        """Draw how many elements decay and how many are exempt, by top-level module.

        Args:
            ax: Axes of matplotlib to draw into; ``None`` makes a figure.

        Returns:
            The axes.

        Raises:
            ImportError: ``ax`` is ``None`` and matplotlib is missing.
        """
        modules = list(dict.fromkeys(row.module for row in self.rows))
        ax = _new_axes(len(modules)) if ax is None else ax
        for offset, color, kind in ((-0.2, "C0", "decayed"), (0.2, "C1", "exempt")):
            counts = dict.fromkeys(modules, 0)
            for row in self.rows:
                if (row.weight_decay == 0) == (kind == "exempt"):
                    counts[row.module] += row.numel
            places = [place + offset for place in range(len(modules))]
            ax.barh(places, list(counts.values()), height=0.4, color=color, label=kind)
        ax.set_yticks(range(len(modules)), modules)
        ax.invert_yaxis()
        # What is exempt is a thousandth of the elements: on a linear axis, nothing.
        ax.set_xscale("log")
        ax.set_xlim(left=0.5)
        ax.set_xlabel("parameters (elements, log scale)")
        named = any(row.name for row in self.rows)
        ax.set_ylabel("top-level module" if named else "parameter group")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        return ax


def amount(count: int, noun: str) -> str:
    """Count a noun: ``1 tensor``, ``1,000 tensors``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _amount(rows: Sequence[Row]) -> str:
    elements = sum(row.numel for row in rows)
    return f"{amount(len(rows), 'tensor')}, {amount(elements, 'element')}"


def _line(rows: Sequence[Row]) -> tuple[str, ...]:
    return (
        _runs(sorted({row.group for row in rows})),
        rows[0].reason,
        _span([row.weight_decay for row in rows]),
        rows[0].effect,
        f"{len(rows):,}",
        f"{sum(row.numel for row in rows):,}",
    )


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
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low} to {high}"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    sides = ("right" if i in NUMBERS else "left" for i in range(len(cells)))
    styled = (
        f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>'
        for side, cell in zip(sides, cells)
    )
    return f"<tr>{''.join(styled)}</tr>"


def _new_axes(modules: int) -> Any:
    try:
        pyplot = import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError(
            "`plot` draws with matplotlib, which is not installed. "
            "Type pip install matplotlib, or pass axes of your own as ax."
        ) from error
    _, ax = pyplot.subplots(figsize=(7, 1.2 + 0.4 * modules), layout="constrained")
    return ax


def _number(value: float | Tensor) -> float:
    return value.item() if isinstance(value, Tensor) else value


def make_row(
    index: int, group: dict[str, Any], decision: Decision, form: Form | None
) -> Row:
    """Join one decision with what its group says now."""
    return Row(
        group=index,
        name=decision.name,
        shape=decision.shape,
        numel=decision.shape.numel(),
        lr=_number(group["lr"]),
        weight_decay=_number(group["weight_decay"]) * decision.decay.multiplier,
        form=form,
        reason=decision.reason,
    )


def make_report(
    param_groups: Sequence[dict[str, Any]],
    decided: Iterable[Sequence[Decision]],
    form_of: Callable[[dict[str, Any], Form | None], Form | None],
) -> DecayReport:
    """Join decisions with what the groups say now."""
    return DecayReport(
        tuple(
            make_row(
                index,
                group,
                decision,
                form_of(group, decision.decay.form),
            )
            for index, (group, decisions) in enumerate(
                zip(param_groups, decided, strict=True)
            )
            for decision in decisions
        )
    )
