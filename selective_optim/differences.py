"""The parameters on which two policies disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from selective_optim._decisions import Decision, decide, require_matches
from selective_optim._rules import Decay, Policy
from selective_optim._table import aligned
from selective_optim.parameters import (
    ModuleIndex,
    ParameterInfo,
    as_modules,
    shape_text,
)


@dataclass(frozen=True)
class Difference:
    """One parameter that two policies decay differently.

    Args:
        name: Canonical name.
        shape: Original shape.
        a: What the first policy decides.
        b: What the second policy decides.
        reason_a: Why the first decides so.
        reason_b: Why the second decides so.
    """

    name: str | None
    shape: torch.Size
    a: Decay
    b: Decay
    reason_a: str
    reason_b: str


@dataclass(frozen=True)
class Differences:
    """One record per parameter in ``rows``; prints as a table, true if not empty."""

    a: Policy
    b: Policy
    rows: tuple[Difference, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return f"no difference between {self.a!r} and {self.b!r}"
        headers = ("name", "shape", "a", "reason", "b", "reason")
        lines = aligned([headers, *map(_cells, self.rows)])
        count = len(self.rows)
        total = "1 parameter differs" if count == 1 else f"{count:,} parameters differ"
        return "\n".join([f"a: {self.a!r}", f"b: {self.b!r}", *lines, total])


def _cells(row: Difference) -> tuple[str, ...]:
    shape = shape_text(row.shape)
    return (
        str(row.name),
        shape,
        _text(row.a),
        row.reason_a,
        _text(row.b),
        row.reason_b,
    )


def _text(decay: Decay) -> str:
    if not decay.multiplier:
        return "exempt"
    words = ["decayed", f"x {decay.multiplier:g}" * (decay.multiplier != 1)]
    return " ".join(filter(None, [*words, decay.form]))


def _decided(policy: Policy, infos: Sequence[ParameterInfo]) -> list[Decision]:
    require_matches(policy, infos, list)
    return decide(policy.bind(infos), infos)


def compare(
    model: nn.Module | Sequence[nn.Module], a: Policy, b: Policy
) -> Differences:
    """Decide for every parameter of a model by two policies and keep what differs."""
    infos = [i for module in as_modules(model) for i in ModuleIndex(module).infos()]
    pairs = zip(_decided(a, infos), _decided(b, infos), strict=True)
    rows = [
        Difference(x.name, x.shape, dx, dy, x.reason, y.reason)
        for x, y in pairs
        if (dx := Decay(x.multiplier, x.form)) != (dy := Decay(y.multiplier, y.form))
        and (dx.multiplier or dy.multiplier)
    ]
    return Differences(a, b, tuple(rows))
