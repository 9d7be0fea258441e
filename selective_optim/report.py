"""The decay report: what will decay, how much and why, before training starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selective_optim._decisions import Decision
from selective_optim._rules import Form


@dataclass(frozen=True)
class Row:
    """What happens to one parameter.

    Args:
        group: Index of its parameter group.
        name: Canonical name, or ``None`` where no name is known.
        shape: Original shape.
        numel: Number of elements.
        lr: Learning rate of the group now.
        weight_decay: Effective decay, ``group["weight_decay"] * multiplier``; 0 is exempt.
        form: ``"l2"`` or ``"decoupled"``.
        reason: The selector that decided.
    """

    group: int
    name: str | None
    shape: torch.Size
    numel: int
    lr: float
    weight_decay: float
    form: Form
    reason: str


HEADERS = ("group", "reason", "decay", "form", "tensors", "elements")


@dataclass(frozen=True)
class DecayReport:
    """One record per parameter in ``rows``; prints as a table by group and reason."""

    rows: tuple[Row, ...]

    def table(self) -> list[tuple[str, ...]]:
        """Sum the rows up by group, reason, decay and form, in the order of the groups."""
        sums: dict[tuple[Any, ...], list[int]] = {}
        for row in self.rows:
            exempt = row.weight_decay == 0
            key = (
                row.group,
                row.reason,
                row.weight_decay,
                "exempt" if exempt else row.form,
            )
            count = sums.setdefault(key, [0, 0])
            count[0] += 1
            count[1] += row.numel
        return [
            (str(group), reason, f"{wd:g}", form, f"{tensors:,}", f"{elements:,}")
            for (group, reason, wd, form), (tensors, elements) in sums.items()
        ]

    def summary(self) -> str:
        """Say in one line how much decays."""
        decayed = [row for row in self.rows if row.weight_decay]
        exempt = [row for row in self.rows if not row.weight_decay]
        return f"decayed: {_amount(decayed)}; exempt: {_amount(exempt)}"

    def __str__(self) -> str:
        lines = [HEADERS, *self.table()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = (1, 3)  # text stands to the left, numbers to the right
        text = [
            "  ".join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*text, self.summary()])


def _amount(rows: Sequence[Row]) -> str:
    return f"{len(rows):,} tensors, {sum(row.numel for row in rows):,} elements"


def _number(value: float | Tensor) -> float:
    return value.item() if isinstance(value, Tensor) else value


def make_report(
    param_groups: Sequence[dict[str, Any]],
    decided: Iterable[Sequence[Decision]],
    decoupled: Callable[[dict[str, Any], Form | None], bool],
) -> DecayReport:
    """Join decisions with what the groups say now."""
    return DecayReport(
        tuple(
            Row(
                group=index,
                name=decision.name,
                shape=decision.shape,
                numel=decision.shape.numel(),
                lr=_number(group["lr"]),
                weight_decay=_number(group["weight_decay"]) * decision.multiplier,
                form="decoupled" if decoupled(group, decision.form) else "l2",
                reason=decision.reason,
            )
            for index, (group, decisions) in enumerate(
                zip(param_groups, decided, strict=True)
            )
            for decision in decisions
        )
    )
