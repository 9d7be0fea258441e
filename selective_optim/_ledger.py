"""To which tensor each decision applies now.

Decisions are kept by group and position and follow frameworks that replace the
tensors of a group, regroup them, or clear the groups and add them again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selective_optim._decay import Form
from selective_optim.parameters import ParameterInfo, shape_now, shape_text


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


class Ledger:
    """Decisions by group and position, followed through changes of the tensors."""

    def __init__(self) -> None:
        self.groups: list[list[Decision]] = []
        self._tensors: list[list[Callable[[], Tensor | None]]] = []

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
            strangers = [shape_text(shape_now(p)) for p in params if id(p) not in known]
            raise RuntimeError(
                f"group {index} holds {len(params)} parameters and decisions are known "
                f"for {len(decided)}; new is one of shape {strangers[0]}. "
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
