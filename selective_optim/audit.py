"""Show what a policy does to a model, without an optimizer or a training run."""

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
from selective_optim.parameters import ModelIndex, ParameterInfo
from selective_optim.policies.differences import decide_alone
from selective_optim.policies.recognition import kind_of
from selective_optim.report import COLORS, DecayReport, make_report, plain

HEADINGS = {
    "norm": "looks wrong: norms that decay",
    "bias": "looks wrong: biases that decay",
    "vector": "looks wrong: tensors of fewer than two dimensions that decay",
    "marked": "looks wrong: decay, and the model's author marked them as exempt",
    "tied": "looks wrong: tied parameters with two verdicts",
    "other": "worth a look: decay, and are neither weights of layers, norms nor biases",
}
ROW_KEYS = ("name", "shape", "numel", "requires_grad", "form", "target")
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
        reason: The reason of the policy; for ``"tied"``, at each place.
    """

    kind: str
    name: str | None
    shape: torch.Size
    reason: str


def model_report(
    model: nn.Module, wd_policy: object = "no_bias_norm", weight_decay: float = 1.0
) -> DecayReport:
    """Report what a policy decays in a model, without an optimizer.

    Args:
        model: Module to report on, on any device, ``meta`` included.
        wd_policy: As for the optimizers.
        weight_decay: Decay that multipliers multiply.

    Returns:
        The report. Its rates are NaN. The form is ``None`` if the policy states none.

    Raises:
        ValueError: The policy is not known, or a glob matches nothing.

    Example:
        >>> print(model_report(nn.Linear(3, 2), "no_bias"))
        group  reason           decay  form     tensors  elements
            0  decays in full       1  default        1         6
            0  exclude is_bias      0  exempt         1         2
        decayed: 1 tensor, 6 elements; exempt: 1 tensor, 2 elements
    """
    infos, decisions = decide_alone(model, wd_policy)
    params = [info.parameter for info in infos]
    group = {"params": params, "lr": math.nan, "weight_decay": weight_decay}
    report = make_report([group], [decisions], lambda group: None, ModelIndex(model))
    return replace(report, remark="")  # an audit lists what looks wrong


def find_mistakes(
    model: nn.Module, wd_policy: object = "no_bias_norm"
) -> list[Finding]:
    """List parameters whose decay looks wrong.

    It lists norms, biases and vectors that decay towards 0, and parameters that decay
    although the model's author marked them (``policies.marked``). It also lists tied
    parameters for which the policy decides differently at different places. Frozen
    parameters are left out. Arguments and errors are those of ``audit``.
    """
    return [found for found in _findings(model, wd_policy) if found.kind != "other"]


def find_hints(model: nn.Module, wd_policy: object = "no_bias_norm") -> list[Finding]:
    """List decayed parameters that are no weights of layers: tokens, scales, gates.

    Few of them are mistakes, but recipes differ on them. Parameters that
    ``find_mistakes`` lists are left out. Arguments and errors are those of ``audit``.
    """
    return [found for found in _findings(model, wd_policy) if found.kind == "other"]


def _findings(model: nn.Module, wd_policy: object) -> Iterator[Finding]:
    policy = policies.as_policy(wd_policy).bind([model])
    author = policies.marked().bind([model])
    for info, decision in zip(*decide_alone(model, wd_policy), strict=True):
        found, kind, marked = dict[str, str](), kind_of(info), author.decide(info)
        if decays := decision.decay.multiplier != 0:
            # Decay towards another value than 0 is intended.
            if kind in HEADINGS and decision.decay.target is None:
                found[kind] = decision.reason
            elif not marked.decay.multiplier:
                found["marked"] = marked.reason
        # Each place by itself: asked as one parameter, all would answer alike.
        alone = [replace(p, names=(p.name or "",), elsewhere=()) for p in info.places]
        answers = [policy.decide(place) for place in alone]
        if len({answer.decay for answer in answers}) > 1:
            told = zip(alone, answers)
            parts = [f"{p.name}: {v.decay.multiplier:g} ({v.reason})" for p, v in told]
            found["tied"] = "; ".join(parts)
        if decays and not found and _is_other(info):
            found["other"] = decision.reason
        if info.parameter.requires_grad:
            where = (info.telling_name, info.parameter.shape)
            yield from (Finding(kind, *where, reason) for kind, reason in found.items())


def _is_other(info: ParameterInfo) -> bool:
    # A shape such as 1 x 64 x 1 x 1, which scales channels, counts as a vector.
    long_sides = [size for size in info.parameter.shape if size > 1]
    return len(long_sides) < 2 or not WEIGHT_LEAF.search(info.leaf or "")


@dataclass(frozen=True)
class Audit:
    """A report, the disagreements with another policy, and what looks wrong.

    Args:
        model: Class name of the model.
        policy: The policy, as it was given.
        report: Decay of every parameter, per unit of ``weight_decay``.
        findings: Parameters whose decay looks wrong.
        against: The other policy, as it was given; ``None`` if there is none.
        difference: Parameters on which the two disagree, as of ``policies.diff``.
        hints: Decayed parameters that are no weights of layers.
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
        return not self.findings and not self.difference

    def __str__(self) -> str:
        title = f"{self.policy} on {self.model}, per unit of weight_decay"
        parts = [f"{title}\n{self.report}"]
        if self.against is not None:
            parts.append(f"against {self.against}\n{self.difference}")
        if not self.findings:
            parts.append("looks wrong: nothing")
        every = [*self.findings, *self.hints]
        for kind, heading in HEADINGS.items():
            if found := [each for each in every if each.kind == kind]:
                parts.append(f"{heading}, {len(found):,}\n{_listed(found)}")
        return "\n\n".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers, ready for JSON."""
        told = self.report.as_dict()
        rows = [
            {key: row[key] for key in (*ROW_KEYS, "fixed", "reason")}
            | {"multiplier": row["weight_decay"] if row["fixed"] is None else 1.0}
            for row in told["rows"]
        ]
        return {
            **{key: getattr(self, key) for key in ("model", "policy", "against")},
            "rows": rows,
            **{key: told[key] for key in COLORS},
            "disagreements": plain(getattr(self.difference, "rows", ())),
            "findings": plain(self.findings),
            "hints": plain(self.hints),
        }


def _listed(found: Sequence[Finding]) -> str:
    cells = [(str(f.name), shape_text(f.shape), f.reason) for f in found[:SHOWN]]
    more = [f"and {len(found) - SHOWN:,} more"] if len(found) > SHOWN else []
    return "\n".join(f"  {line}" for line in [*aligned(cells), *more])


def audit(
    model: nn.Module, wd_policy: object = "no_bias_norm", against: object = None
) -> Audit:
    """Report what a policy decays, what looks wrong, and how another one differs.

    Args:
        model: Module to audit, on any device, ``meta`` included.
        wd_policy: As for the optimizers.
        against: Another policy to compare with, or ``None``.

    Raises:
        ValueError: A policy is not known, or a glob matches nothing.
    """
    told, other = (p if isinstance(p, str) else repr(p) for p in (wd_policy, against))
    compared = against is not None
    return Audit(
        model=type(model).__name__,
        policy=told,
        report=model_report(model, wd_policy),
        findings=tuple(find_mistakes(model, wd_policy)),
        against=other if compared else None,
        difference=policies.diff(model, wd_policy, against) if compared else None,
        hints=tuple(find_hints(model, wd_policy)),
    )
