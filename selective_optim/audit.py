"""What a policy would do to a model, told without an optimizer or a training run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from selective_optim import policies
from selective_optim._model_index import ModelIndex
from selective_optim._text import aligned, shape_text
from selective_optim.parameters import ParameterInfo
from selective_optim.policies import Policy, is_bias, is_norm, is_vector
from selective_optim.policies.decide import decide_alone
from selective_optim.report import DecayReport, make_row

# The first that matches names the mistake: a norm's bias counts as a norm.
SUSPECTS = {"norm": is_norm, "bias": is_bias, "vector": is_vector}
HEADINGS = {
    "norm": "norms that decay",
    "bias": "biases that decay",
    "vector": "tensors of fewer than two dimensions that decay",
    "tied": "tied parameters with two verdicts",
}
SHOWN = 10  # lines of each heading that print; all of them are in `findings`


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong under a policy.

    Args:
        kind: ``"norm"``, ``"bias"``, ``"vector"`` or ``"tied"``.
        name: Canonical name of the parameter.
        shape: Its shape.
        reason: What made the policy decide so; for ``"tied"``, at each place.
    """

    kind: str
    name: str
    shape: torch.Size
    reason: str


def model_report(
    model: nn.Module, wd_policy: object = "no_bias_norm", weight_decay: float = 1.0
) -> DecayReport:
    """Tell what a policy decays in a model, before there is an optimizer.

    Args:
        model: Module to report on, on any device, ``meta`` included.
        wd_policy: As for the optimizers.
        weight_decay: Decay that multipliers multiply.

    Returns:
        The report, with a learning rate of NaN, and ``None`` where the form is left
        to the optimizer.

    Raises:
        ValueError: The policy is not known, or a glob matches nothing.

    Example:
        >>> print(model_report(nn.Linear(3, 2), "no_bias"))
        group  reason           decay  form     tensors  elements
            0  no match             1  default        1         6
            0  exclude is_bias      0  exempt         1         2
        decayed: 1 tensor, 6 elements; exempt: 1 tensor, 2 elements
    """
    infos = ModelIndex(model).everyone()
    decided = decide_alone(policies.as_policy(wd_policy), [model], infos)
    group = {"lr": math.nan, "weight_decay": weight_decay}
    return DecayReport(tuple(make_row(0, group, d, d.decay.form) for d in decided))


def find_mistakes(
    model: nn.Module, wd_policy: object = "no_bias_norm"
) -> list[Finding]:
    """List what looks wrong: norms, biases and vectors that decay, split verdicts.

    A split verdict is that of a tied parameter whose places, each taken alone, the
    policy would treat differently. Frozen parameters never decay and are left out.

    Args:
        model: Module to look at.
        wd_policy: As for the optimizers.

    Raises:
        ValueError: The policy is not known, or a glob matches nothing.
    """
    infos = ModelIndex(model).everyone()
    policy = policies.as_policy(wd_policy)
    decide_alone(policy, [model], infos)
    policy = policy.bind([model])
    trained = [info for info in infos if info.parameter.requires_grad]
    return [finding for info in trained for finding in _mistakes(policy, info)]


def _mistakes(policy: Policy, info: ParameterInfo) -> Iterator[Finding]:
    verdict, where = policy.decide(info), (info.name or "", info.parameter.shape)
    kinds = (kind for kind, selector in SUSPECTS.items() if selector.matches(info))
    if verdict.decay.multiplier and (kind := next(kinds, None)):
        yield Finding(kind, *where, verdict.reason)
    alone = [replace(p, names=(p.name or "",), elsewhere=()) for p in info.places]
    verdicts = [policy.decide(place) for place in alone]
    if len({verdict.decay for verdict in verdicts}) > 1:
        told = (f"{p.name}: {v.decay.multiplier:g} ({v.reason})"
                for p, v in zip(alone, verdicts))  # fmt: skip
        yield Finding("tied", *where, "; ".join(told))


@dataclass(frozen=True)
class Audit:
    """A report, the disagreements with another policy, and what looks wrong.

    Args:
        model: Class name of the model.
        policy: The policy, as it was given.
        report: What it decays, per unit of ``weight_decay``.
        findings: What looks wrong.
        against: The other policy, as it was given; ``None`` if there is none.
        difference: Where the two disagree, as of ``policies.diff``.
    """

    model: str
    policy: str
    report: DecayReport
    findings: tuple[Finding, ...]
    against: str | None = None
    difference: Any = None

    def __str__(self) -> str:
        title = f"{self.policy} on {self.model}, per unit of weight_decay"
        parts = [f"{title}\n{self.report}"]
        if self.against is not None:
            parts.append(f"against {self.against}\n{self.difference}")
        parts += [_listing(kind, self.findings) for kind in HEADINGS]
        if not self.findings:
            parts.append("looks wrong: nothing")
        return "\n\n".join(filter(None, parts))

    def as_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers, ready for JSON."""
        rows = [
            {
                "name": row.name,
                "shape": list(row.shape),
                "numel": row.numel,
                "multiplier": row.weight_decay,
                "form": row.form,
                "reason": row.reason,
            }
            for row in self.report.rows
        ]
        return {
            "model": self.model,
            "policy": self.policy,
            "rows": rows,
            "decayed": self._totals(decayed=True),
            "exempt": self._totals(decayed=False),
            "against": self.against,
            "disagreements": [_plain(row) for row in self._disagreements()],
            "findings": [_plain(finding) for finding in self.findings],
        }

    def _totals(self, decayed: bool) -> dict[str, int]:
        rows = [r for r in self.report.rows if bool(r.weight_decay) == decayed]
        return {"tensors": len(rows), "elements": sum(row.numel for row in rows)}

    def _disagreements(self) -> Sequence[Any]:
        return () if self.against is None else self.difference.rows


def _listing(kind: str, findings: Sequence[Finding]) -> str:
    mine = [finding for finding in findings if finding.kind == kind]
    if not mine:
        return ""
    cells = [(f.name, shape_text(f.shape), f.reason) for f in mine[:SHOWN]]
    lines = [f"looks wrong: {HEADINGS[kind]}, {len(mine):,}"]
    lines += [f"  {line}" for line in aligned(cells)]
    if len(mine) > SHOWN:
        lines.append(f"  and {len(mine) - SHOWN:,} more")
    return "\n".join(lines)


def _plain(record: Any) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return {name: _plain_value(value) for name, value in values.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, policies.Decay):
        return _plain(value)
    return list(value) if isinstance(value, (tuple, torch.Size)) else value


def audit(
    model: nn.Module, wd_policy: object = "no_bias_norm", against: object = None
) -> Audit:
    """Report what a policy decays in a model, what looks wrong, and who disagrees.

    Args:
        model: Module to audit, on any device, ``meta`` included.
        wd_policy: As for the optimizers.
        against: Another policy to compare with, or ``None``.

    Raises:
        ValueError: A policy is not known, or a glob matches nothing.
    """
    difference = None if against is None else policies.diff(model, wd_policy, against)
    return Audit(
        model=type(model).__name__,
        policy=_as_given(wd_policy),
        report=model_report(model, wd_policy),
        findings=tuple(find_mistakes(model, wd_policy)),
        against=None if against is None else _as_given(against),
        difference=difference,
    )


def _as_given(wd_policy: object) -> str:
    return wd_policy if isinstance(wd_policy, str) else repr(wd_policy)
