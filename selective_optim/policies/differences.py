"""What policies decide where there is no optimizer, and where two disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from selective_optim._text import aligned, shape_text
from selective_optim.decay import Decay, Decision, target_text
from selective_optim.parameters import ModelIndex, ParameterInfo, as_modules
from selective_optim.policies.decide import decide, require_matches
from selective_optim.policies.named import as_policy
from selective_optim.policies.selectors import Policy


@dataclass(frozen=True)
class Difference:
    """One parameter that two policies decay differently.

    Args:
        name: Canonical name.
        shape: Original shape.
        a: Decision of the first policy.
        b: Decision of the second policy.
        reason_a: Reason of the first.
        reason_b: Reason of the second.
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
        table = [("name", "shape", "a", "reason", "b", "reason")]
        for row in self.rows:
            decisions = (_text(row.a), row.reason_a, _text(row.b), row.reason_b)
            table.append((str(row.name), shape_text(row.shape), *decisions))
        count = len(self.rows)
        total = "1 parameter differs" if count == 1 else f"{count:,} parameters differ"
        return "\n".join([f"a: {self.a!r}", f"b: {self.b!r}", *aligned(table), total])


def _text(decay: Decay) -> str:
    if not decay.multiplier:
        return "exempt"
    words = ["decayed", f"x {decay.multiplier:g}" * (decay.multiplier != 1)]
    words.append("" if decay.fixed is None else f"by {decay.fixed:g}")
    target = "" if decay.target is None else f"towards {target_text(decay.target)}"
    return " ".join(filter(None, [*words, decay.form, target]))


def decide_alone(
    model: object, wd_policy: object
) -> tuple[list[ParameterInfo], list[Decision]]:
    """Decide for the parameters of a model where there is no optimizer."""
    policy, roots = as_policy(wd_policy), as_modules(model)
    infos = ModelIndex(roots).everyone()
    require_matches(policy, infos, lambda selector: False, list)
    return infos, decide(policy.bind(roots), infos)


def diff(model: nn.Module | Sequence[nn.Module], a: object, b: object) -> Differences:
    """List the parameters of a model on which two policies disagree.

    Args:
        model: Module or modules with the parameters, also on the meta device.
        a: A policy, as for ``wd_policy``.
        b: Another policy.

    Raises:
        ValueError: A policy cannot decide for a parameter.

    Example:
        >>> print(diff(nn.Linear(2, 3), "all", "nanogpt").rows[0].reason_b)
        nanogpt: ndim < 2
    """
    policies, roots = (as_policy(a), as_policy(b)), as_modules(model)
    decisions = (decide_alone(roots, policy)[1] for policy in policies)
    rows = [
        Difference(x.name, x.shape, x.decay, y.decay, x.reason, y.reason)
        for x, y in zip(*decisions, strict=True)
        if x.decay != y.decay and (x.decay.multiplier or y.decay.multiplier)
    ]
    return Differences(*policies, tuple(rows))
