"""What a policy would do to a model, told without an optimizer or a training run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from selective_optim import policies
from selective_optim._text import aligned, shape_text
from selective_optim.decay import Decision, Verdict
from selective_optim.parameters import ModelIndex, ParameterInfo
from selective_optim.policies import Policy
from selective_optim.policies.decide import decide_alone
from selective_optim.policies.selectors import kind_of
from selective_optim.report import DecayReport, make_row

HEADINGS = {
    "norm": "norms that decay",
    "bias": "biases that decay",
    "vector": "tensors of fewer than two dimensions that decay",
    "marked": "decay, and the model's author marked them as exempt",
    "tied": "tied parameters with two verdicts",
}
HINT = "worth a look: decay, and are neither weights of layers, norms nor biases"
# What the weights of a layer are called: weight, in_proj_weight, gate_up_proj.
WEIGHT_LEAF = re.compile(r"weight|kernel|proj")
SHOWN = 10  # lines of each heading that print; all of them are in `findings`


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong under a policy.

    Args:
        kind: ``"norm"``, ``"bias"``, ``"vector"``, ``"marked"`` or ``"tied"``; of a
            hint ``"other"``.
        name: Canonical name of the parameter.
        shape: Its shape.
        reason: What made the policy decide so; for ``"tied"``, at each place.
    """

    kind: str
    name: str | None
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
    group = {"lr": math.nan, "weight_decay": weight_decay}
    return DecayReport(
        tuple(
            make_row(0, group, d, d.decay.form, info.parameter)
            for info, d in _decided(model, wd_policy)
        )
    )


def _decided(
    model: nn.Module, wd_policy: object
) -> list[tuple[ParameterInfo, Decision]]:
    infos = ModelIndex(model).everyone()
    decisions = decide_alone(policies.as_policy(wd_policy), [model], infos)
    return list(zip(infos, decisions, strict=True))


def find_mistakes(
    model: nn.Module, wd_policy: object = "no_bias_norm"
) -> list[Finding]:
    """List what looks wrong: norms, biases, vectors that decay to 0, split verdicts.

    So does what the model's author marked as exempt, as ``policies.marked`` reads it.
    A split verdict is that of a tied parameter whose places, each taken alone, the
    policy would treat differently. Frozen parameters never decay and are left out.

    Args:
        model: Module to look at.
        wd_policy: As for the optimizers.

    Raises:
        ValueError: The policy is not known, or a glob matches nothing.
    """
    policy = policies.as_policy(wd_policy).bind([model])
    author = policies.marked().bind([model])
    return [
        finding
        for info, decision in _decided(model, wd_policy)
        if info.parameter.requires_grad
        for finding in _mistakes(policy, decision, author.decide(info), info)
    ]


def _mistakes(
    policy: Policy, decision: Decision, marked: Verdict, info: ParameterInfo
) -> Iterator[Finding]:
    where = (info.telling_name, info.parameter.shape)
    if decision.decay.multiplier:
        # What decays towards anything else than 0 was meant to.
        kind = kind_of(info)
        if kind in HEADINGS and decision.decay.target is None:
            yield Finding(kind, *where, decision.reason)
        elif not marked.decay.multiplier:
            yield Finding("marked", *where, marked.reason)
    # Each place by itself: asked as one parameter, all would answer alike.
    alone = [replace(p, names=(p.name or "",), elsewhere=()) for p in info.places]
    verdicts = [policy.decide(place) for place in alone]
    if len({verdict.decay for verdict in verdicts}) > 1:
        told = (f"{p.name}: {v.decay.multiplier:g} ({v.reason})"
                for p, v in zip(alone, verdicts))  # fmt: skip
        yield Finding("tied", *where, "; ".join(told))


def find_hints(model: nn.Module, wd_policy: object = "no_bias_norm") -> list[Finding]:
    """List what decays and is no weight of a layer: tokens, layer scales, gates.

    Few of them are mistakes, but recipes differ on them. What
    :func:`find_mistakes` lists is left out.

    Args:
        model: Module to look at.
        wd_policy: As for the optimizers.

    Raises:
        ValueError: The policy is not known, or a glob matches nothing.
    """
    mistakes = {finding.name for finding in find_mistakes(model, wd_policy)}
    return [
        Finding("other", info.telling_name, info.parameter.shape, decision.reason)
        for info, decision in _decided(model, wd_policy)
        if info.parameter.requires_grad
        and info.telling_name not in mistakes
        and decision.decay.multiplier
        and _is_other(info)
    ]


def _is_other(info: ParameterInfo) -> bool:
    """Tell whether a parameter is called like no weight, or is a vector in disguise."""
    # A vector in disguise: 1 x 64 x 1 x 1 scales channels.
    long_sides = [size for size in info.parameter.shape if size > 1]
    return len(long_sides) < 2 or not WEIGHT_LEAF.search(info.leaf or "")


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
        hints: What decays and is no weight of a layer, as a rule rightly.
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
        return not self.findings and not self._disagreements()

    def __str__(self) -> str:
        title = f"{self.policy} on {self.model}, per unit of weight_decay"
        parts = [f"{title}\n{self.report}"]
        if self.against is not None:
            parts.append(f"against {self.against}\n{self.difference}")
        for kind, heading in HEADINGS.items():
            mine = [finding for finding in self.findings if finding.kind == kind]
            parts.append(_listing(f"looks wrong: {heading}", mine))
        if not self.findings:
            parts.append("looks wrong: nothing")
        parts.append(_listing(HINT, self.hints))
        return "\n\n".join(filter(None, parts))

    def as_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers, ready for JSON."""
        rows = [
            {
                "name": row.name,
                "shape": list(row.shape),
                "numel": row.numel,
                "multiplier": row.weight_decay,
                "requires_grad": row.requires_grad,
                "form": row.form,
                "target": row.target,
                "reason": row.reason,
            }
            for row in self.report.rows
        ]
        return {
            "model": self.model,
            "policy": self.policy,
            "rows": rows,
            **{fate: self._totals(fate) for fate in ("decayed", "exempt", "frozen")},
            "against": self.against,
            "disagreements": [_plain(row) for row in self._disagreements()],
            "findings": [_plain(finding) for finding in self.findings],
            "hints": [_plain(finding) for finding in self.hints],
        }

    def _totals(self, fate: str) -> dict[str, int]:
        rows = [row for row in self.report.rows if row.fate == fate]
        return {"tensors": len(rows), "elements": sum(row.numel for row in rows)}

    def _disagreements(self) -> Sequence[Any]:
        return () if self.against is None else self.difference.rows


def _listing(heading: str, findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    shown = findings[:SHOWN]
    cells = [(str(f.name), shape_text(f.shape), f.reason) for f in shown]
    lines = [f"{heading}, {len(findings):,}"]
    lines += [f"  {line}" for line in aligned(cells)]
    if len(findings) > SHOWN:
        lines.append(f"  and {len(findings) - SHOWN:,} more")
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
        hints=tuple(find_hints(model, wd_policy)),
    )


def _as_given(wd_policy: object) -> str:
    return wd_policy if isinstance(wd_policy, str) else repr(wd_policy)
