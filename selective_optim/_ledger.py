"""To which tensor each decision applies now.

Decisions are kept by group and position and follow frameworks that replace the
tensors of a group, regroup them, or clear the groups and add them again.
"""

from __future__ import annotations

from collections import Counter
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


def _may_be(info: ParameterInfo, decided: Decision) -> bool:
    """Tell whether nothing known of a parameter contradicts what was decided on."""
    same_name = info.name in (None, decided.name) or decided.name is None
    return same_name and info.shape in (None, decided.shape)


class Ledger:
    """Decisions by group and position, followed through changes of the tensors.

    It holds no reference to a parameter, weak or strong: a strong one would keep
    the unsharded model in memory, and ``torch.utils.swap_tensors``, which
    ``model.to`` uses on ``DTensor``s, refuses a tensor that has a weak one.
    """

    def __init__(self) -> None:
        self.groups: list[list[Decision]] = []
        self._ids: list[list[int]] = []

    def remembered(
        self, index: int, infos: Sequence[ParameterInfo]
    ) -> list[Decision] | None:
        """Return the decisions of a group that was cleared and now comes again."""
        if index >= len(self.groups) or len(self.groups[index]) != len(infos):
            return None
        if not all(map(_may_be, infos, self.groups[index])):
            return None
        return self.groups[index]

    def record(
        self, index: int, params: Sequence[Tensor], decisions: list[Decision]
    ) -> None:
        """Write down what was decided for the group at ``index``."""
        self.groups[index : index + 1] = [decisions]
        self._ids[index : index + 1] = [list(map(id, params))]

    def follow(
        self,
        param_groups: Sequence[dict[str, Any]],
        name_of: Callable[[Tensor], str | None],
    ) -> list[list[Decision]]:
        """Return a decision for every parameter as the groups stand now.

        A parameter whose name is known keeps its decision wherever it stands; any
        other takes over the decision of its position.

        Args:
            param_groups: The optimizer's groups.
            name_of: Gives the name under which the model holds a tensor now.

        Raises:
            RuntimeError: A group holds other parameters than were decided for.
        """
        ids = [list(map(id, group["params"])) for group in param_groups]
        if ids != self._ids:
            named = self._by_name()
            found = [
                self._of_group(index, group["params"], named, name_of)
                for index, group in enumerate(param_groups)
            ]
            self.groups, self._ids = found, ids
        return self.groups

    def _by_name(self) -> dict[str | None, Decision]:
        decisions = [decision for group in self.groups for decision in group]
        counts = Counter(decision.name for decision in decisions)
        return {d.name: d for d in decisions if d.name and counts[d.name] == 1}

    def _of_group(
        self,
        index: int,
        params: Sequence[Tensor],
        named: dict[str | None, Decision],
        name_of: Callable[[Tensor], str | None],
    ) -> list[Decision]:
        known = [named.get(name_of(param)) for param in params]
        if (own := [d for d in known if d is not None]) and len(own) == len(known):
            return own
        decided = self.groups[index] if index < len(self.groups) else []
        if len(decided) != len(params):
            strangers = [p for p, decision in zip(params, known) if decision is None]
            raise RuntimeError(
                f"group {index} holds {len(params)} parameters and decisions are known "
                f"for {len(decided)}; new is one of shape "
                f"{shape_text(shape_now(strangers[0]))}. "
                f"Add parameters through optimizer.add_param_group({{'params': ...}})."
            )
        return [own or by_place for own, by_place in zip(known, decided)]

    def __getstate__(self) -> dict[str, Any]:
        return {"groups": self.groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.groups, self._ids = state["groups"], []
