"""What was decided for each parameter, and to which tensor it applies now.

Decisions are taken once. The ledger keeps them by group and position and follows
frameworks that replace the tensors of a group, regroup them, or clear the groups
and add them again.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._rules import FULL, Form, Policy, Verdict, unmatched
from selective_optim.parameters import ParameterInfo, shape_text

WAYS_OUT = 'Pass model=model or model.named_parameters(), or use wd_policy="matrices".'


@dataclass(frozen=True)
class Decision:
    """The verdict on one parameter, and what is remembered of it."""

    name: str | None
    shape: torch.Size
    multiplier: float
    form: Form | None
    reason: str

    def label(self, group: int, position: int) -> str:
        """Name the parameter as a message should: by name if known, else by place."""
        return (
            repr(self.name) if self.name else f"parameter {position} of group {group}"
        )


def decide(policy: Policy | None, infos: Sequence[ParameterInfo]) -> list[Decision]:
    """Ask the policy about every parameter.

    Raises:
        ValueError: The policy needs what is not known of a parameter, or fails.
        TypeError: The policy yields something other than a decay.
    """
    return [_decision(policy, info, position) for position, info in enumerate(infos)]


def _decision(policy: Policy | None, info: ParameterInfo, position: int) -> Decision:
    verdict = Verdict(FULL, "no policy")
    if policy is not None:
        _require_knowledge(policy, info, position)
        verdict = _ask(policy, info, position)
    shape = info.parameter.shape if info.shape is None else info.shape
    return Decision(
        info.name, shape, verdict.decay.multiplier, verdict.decay.form, verdict.reason
    )


def _ask(policy: Policy, info: ParameterInfo, position: int) -> Verdict:
    try:
        return policy.decide(info)
    except Exception as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        known = (
            ""
            if info.owner is not None
            else f" Known are only its shape{_or_name(info)}. {WAYS_OUT}"
        )
        raise kind(
            f"`wd_policy` {policy!r} failed for {info.describe(position)}: "
            f"{type(error).__name__}: {error}{known}"
        ) from error


def _or_name(info: ParameterInfo) -> str:
    return " and name" if info.name else ""


def _require_knowledge(policy: Policy, info: ParameterInfo, position: int) -> None:
    needs = policy.needs
    if _torch.is_flat_parameter(info.parameter):
        raise ValueError(
            f"{info.describe(position)} is FSDP's flat parameter, of which no single decay is "
            f"right. Wrap with use_orig_params=True."
        )
    lacking = [
        need
        for need, known in (
            ("names", info.name),
            ("modules", info.owner),
            ("shapes", info.shape),
        )
        if need in needs and known is None
    ]
    if "shapes" in lacking:
        raise ValueError(
            f"`wd_policy` {policy!r} needs the shape of {info.describe(position)}, which FSDP "
            f"flattened. Wrap with use_orig_params=True and pass model=model, or decide before "
            f"wrapping."
        )
    if lacking:
        wanted = {"names": "names", "modules": "module types"}[lacking[-1]]
        raise ValueError(
            f"`wd_policy` {policy!r} needs {wanted}, and of {info.describe(position)} "
            f"only {'the name' if info.name else 'the tensor'} is known. {WAYS_OUT}"
        )


def require_matches(
    policy: Policy,
    infos: Sequence[ParameterInfo],
    everyone: Callable[[], Sequence[ParameterInfo]],
) -> None:
    """Check that every glob and regular expression matches some parameter.

    Args:
        policy: The policy that decides for ``infos``.
        infos: What is known of the optimizer's parameters.
        everyone: Gives what is known of the model's, a frozen part included.

    Raises:
        ValueError: One matches none; the message gives the closest names.
    """
    if not (absent := unmatched(policy, infos)):
        return
    infos = [*infos, *everyone()]
    names = list(dict.fromkeys(name for info in infos for name in info.names))
    if not names or not (absent := unmatched(policy, infos)):
        return  # without names, deciding raises and says so
    pattern = getattr(absent[0].pattern, "pattern", absent[0].pattern)
    close = get_close_matches(pattern, names, n=3, cutoff=0.0)
    raise ValueError(
        f"{absent[0]!r} in `wd_policy` matches none of {len(names)} parameter names; the closest "
        f"are {', '.join(map(repr, close))}. Correct it, or pass missing_ok=True to its policy."
    )


def require_shapes(
    param_groups: Sequence[dict[str, Any]], ledger: Ledger, state_dict: dict[str, Any]
) -> None:
    """Check that the tensors of a state dict belong to these parameters.

    Raises:
        ValueError: One has another shape than its parameter.
    """
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [param for group in param_groups for param in group["params"]]
    if len(saved) != len(params):
        return  # torch says which group differs
    decisions = chain.from_iterable(ledger.follow(param_groups))
    for index, param, decision in zip(saved, params, decisions, strict=True):
        for entry, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != param.shape:
                raise ValueError(
                    f"{entry!r} of parameter {index} in the state dict has shape "
                    f"{shape_text(value.shape)}, but {decision.label(0, index)} has "
                    f"{shape_text(param.shape)}. Load the state dict of the same model."
                )


def warn_of_changes(
    groups: Sequence[Sequence[Decision]],
    saved: Sequence[Sequence[Sequence[Any]]],
    now: Sequence[Sequence[Sequence[Any]]],
) -> None:
    """Warn once if a checkpoint was made with other decisions than those now taken."""
    changes = [
        f"{decision.label(index, position)} decayed {_record_text(old)} and now {_record_text(new)}"
        for index, (group, olds, news) in enumerate(zip(groups, saved, now))
        for position, (decision, old, new) in enumerate(zip(group, olds, news))
        if list(old) != list(new) and (old[0] or new[0])
    ]
    if changes:
        more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
        warnings.warn(
            f"the loaded checkpoint was made with another weight decay policy: "
            f"{'; '.join(changes[:3])}{more}. The policy of the constructor is kept; pass the old "
            f"one as wd_policy to continue as before.",
            stacklevel=3,
        )


def _record_text(record: Sequence[Any]) -> str:
    multiplier, form = record
    return f"{multiplier:g} times ({form})" if multiplier else "0 times"


class Ledger:
    """Decisions by group and position, followed through changes of the tensors."""

    def __init__(self) -> None:
        self.groups: list[list[Decision]] = []
        self._tensors: list[list[weakref.ref[Tensor]]] = []

    def remembered(
        self, index: int, infos: Sequence[ParameterInfo]
    ) -> list[Decision] | None:
        """Return the decisions of a group that was cleared and now comes again."""
        if index >= len(self.groups) or len(self.groups[index]) != len(infos):
            return None
        same = zip(self.groups[index], infos, strict=True)
        if any(i.name and d.name and i.name != d.name for d, i in same):
            return None
        return self.groups[index]

    def record(
        self, index: int, params: Sequence[Tensor], decisions: list[Decision]
    ) -> None:
        """Write down what was decided for the group at ``index``."""
        self.groups[index : index + 1] = [decisions]
        self._tensors[index : index + 1] = [[weakref.ref(p) for p in params]]

    def follow(self, param_groups: Sequence[dict[str, Any]]) -> list[list[Decision]]:
        """Return a decision for every parameter as the groups stand now.

        A tensor keeps its own decision wherever it stands; one that replaced
        another takes over the decision of its position.

        Raises:
            RuntimeError: A group holds more or fewer parameters than were decided.
        """
        if self._unchanged(param_groups):
            return self.groups
        known = {
            id(ref()): decision
            for refs, decisions in zip(self._tensors, self.groups, strict=True)
            for ref, decision in zip(refs, decisions, strict=True)
            if ref() is not None
        }
        found = [
            self._of_group(i, g["params"], known) for i, g in enumerate(param_groups)
        ]
        del self.groups[len(found) :], self._tensors[len(found) :]
        for index, (group, decisions) in enumerate(
            zip(param_groups, found, strict=True)
        ):
            self.record(index, group["params"], decisions)
        return self.groups

    def _unchanged(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        return len(param_groups) == len(self._tensors) and all(
            len(refs) == len(group["params"])
            and all(ref() is p for ref, p in zip(refs, group["params"], strict=True))
            for refs, group in zip(self._tensors, param_groups, strict=True)
        )

    def _of_group(
        self, index: int, params: Sequence[Tensor], known: dict[int, Decision]
    ) -> list[Decision]:
        if all(id(param) in known for param in params):
            return [known[id(param)] for param in params]
        decided = self.groups[index] if index < len(self.groups) else []
        if len(decided) != len(params):
            strangers = [shape_text(p.shape) for p in params if id(p) not in known]
            raise RuntimeError(
                f"group {index} holds {len(params)} parameters and decisions are known for "
                f"{len(decided)}; new is one of shape {strangers[0]}. "
                f"Add parameters through optimizer.add_param_group({{'params': ...}})."
            )
        return [known.get(id(p), d) for p, d in zip(params, decided, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        return {"groups": self.groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.groups = state["groups"]
        self._tensors = [[_gone] * len(decisions) for decisions in self.groups]


def _gone() -> None:
    """Stand in for a weak reference that pickling dropped; positions decide then."""
